"""cauchyfit: elliptical Gaussians fitted to many images by maximum Cauchy likelihood. The modules, in reading order:

columns      what a catalogue row is: columns, units, flags
config       the config, checked and completed
files        outputs that appear whole or not at all
origin       what each output was made of, and what the run wants
carry        what goes along from headers and tables into the catalogue
keywords     what the keywords of a header say
hdus         what a FITS file holds
places       where planes and cells lie in the data
headers      the header of an HDU
versions     whether a file is what the scan has found
tiles        pixels that are compressed tile by tile
planes       planes and stamps as arrays
maps         masks, uncertainties and backgrounds
images       FITS <-> arrays: which files hold images, and their pixels
cells        keywords and cells that belong to an image
listing      which files there are, and whether they are what they were
detection    sources found in larger images, and what of a stamp belongs to others
shards       which job fits which images
resources    memory and time that a job asks for
model        the Gaussian and what is derived from it
simulate     images with known truth
likelihood   the Cauchy likelihood and its derivatives, by automatic differentiation
reductions   sums over many maps at once
moments      the same derivatives of the built-in model, a thousand times as fast
start        first guess
newton       one step of the minimiser; knows no images
slots        many iterations of different length at once
correlation  noise whose pixels are not independent
uncertainty  four covariances, biases, errors of derived quantities
traced       programs that are traced once for all processes
quality      what a fit says about itself, flags
program      the compiled fit of a queue of images of one shape
fit          stacks of images -> rows and covariances
sky          pixel <-> sky, beam
cutouts      sources in larger images, by a table or by detection
certificate  sources put into the residuals of a run and fitted again
catalogue    parts and catalogue in HDF5
reuse        rows of images that have not changed
numerals     numbers as text
tallies      what a report counts
diagrams     histograms and coverage, drawn
pictures     rows with their pixels, drawn
report       the page that says what a run found
runtime      log, threads, device, compile cache of a job
batches      the images of shards as stacks, a batch at a time
jobs         one function a rule; joins the others

Imports point up this list. The rules that call `jobs` are in ``workflow``.
"""

__version__ = "0.5.0"
