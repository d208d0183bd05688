"""Many small iterations of different length at once: a fixed number of slots, kept full.

A vmapped loop would wait for its slowest member. Here a few steps are taken in all slots, those that are done give up
their result, and the next in the queue take their places. One compiled program serves any number of problems.
"""

import jax
import jax.numpy as jnp
import numpy as np


def run(queue, count, *, begin, step, going, result, slots, burst):
    """Iterate every problem of a queue to its end.

    Parameters
    ----------
    queue : tree of arrays (q, ...)
        The problems; q >= slots.
    count : int array ()
        Only the first ``count`` of them are solved.
    begin : callable
        problem -> state.
    step : callable
        problem, state -> state.
    going : callable
        problem, state -> bool.
    result : callable
        state -> array (r,), what is kept of it.
    slots : int
    burst : int
        Steps between two looks at who is done.

    Returns
    -------
    array (q, r)
        Results in the order of the queue, 0 beyond ``count``. No number depends on the neighbours of a problem, nor on
        its place.
    """
    begin, step, going, result = map(jax.vmap, (begin, step, going, result))
    queue, whole = _packed(queue)
    length = len(queue[0])

    def where(mask, new, old):
        return jax.tree.map(lambda a, b: jnp.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)

    def round_(carry):
        packed, state, index, busy, waiting, results = carry
        problems = whole(packed)

        def advance(_, state):
            return where(busy & going(problems, state), step(problems, state), state)

        state = jax.lax.fori_loop(0, burst, advance, state)
        done = busy & ~going(problems, state)
        rows = result(state)
        follower = jnp.where(done, waiting + jnp.cumsum(done) - 1, index)
        if jax.default_backend() == "cpu":
            order = jnp.argsort(~done, stable=True)

            def swap(i, carry):
                packed, results = carry
                slot = order[i]
                packed = [_put(a, slot, b, follower[slot]) for a, b in zip(packed, queue, strict=True)]
                return packed, _put(results, index[slot], rows, slot)

            packed, results = jax.lax.fori_loop(0, jnp.sum(done), swap, (packed, results))
        else:
            results = results.at[jnp.where(done, index, length)].set(rows, mode="drop")
            source = jnp.minimum(follower, length - 1)
            packed = where(done, [a[source] for a in queue], packed)
        busy = busy & (follower < count)
        state = where(done, begin(whole(packed)), state)
        return packed, state, follower, busy, waiting + jnp.sum(done), results

    packed = [a[:slots] for a in queue]
    state = begin(whole(packed))
    index = jnp.arange(slots)
    empty = jnp.zeros((length, *jax.eval_shape(result, state).shape[1:]))
    carry = (packed, state, index, index < count, jnp.asarray(slots), empty)
    return jax.lax.while_loop(lambda carry: jnp.any(carry[3]), round_, carry)[-1]


def _put(into, place, of, number):
    """An array with row ``place`` replaced by row ``number`` of another, or its last one."""
    row = jax.lax.dynamic_index_in_dim(of, number, keepdims=True)
    return jax.lax.dynamic_update_slice_in_dim(into, row, place, 0)


def _packed(queue):
    """A queue as few arrays, so that to move a problem takes few operations; and what makes of some rows a tree again.

    Moved leaf by leaf, fits in slots take a thirtieth longer. Numbers and vectors go into one array of float64, which
    holds whole numbers below 2^53 too.
    """
    leaves, tree = jax.tree.flatten(queue)
    small = [leaf for leaf in leaves if leaf.ndim <= 2]
    flat = [leaf.reshape(len(leaf), -1).astype(float) for leaf in small]
    ends = np.cumsum([leaf.shape[1] for leaf in flat])[:-1]

    def whole(packed):
        parts = zip(jnp.split(packed[0], ends, axis=1), small, strict=True)
        numbers = iter([part.reshape(-1, *leaf.shape[1:]).astype(leaf.dtype) for part, leaf in parts])
        large = iter(packed[1:])
        return jax.tree.unflatten(
            tree,
            [next(numbers) if leaf.ndim <= 2 else next(large).reshape(-1, *leaf.shape[1:]) for leaf in leaves],
        )

    return [jnp.concatenate(flat, axis=1), *(leaf.reshape(len(leaf), -1) for leaf in leaves if leaf.ndim > 2)], whole
