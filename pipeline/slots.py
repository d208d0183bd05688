"""Many small iterations of different length at once: a fixed number of slots, kept full.

A vmapped loop would wait for its slowest member. Here a few steps are taken in all slots, those that are done give up
their result, and the next in the queue take their places. One compiled program serves any number of problems.
"""

import jax
import jax.numpy as jnp


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
    length = jax.tree.leaves(queue)[0].shape[0]
    begin, step, going, result = map(jax.vmap, (begin, step, going, result))

    def where(mask, new, old):
        return jax.tree.map(lambda a, b: jnp.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)

    def round_(carry):
        problems, state, index, busy, waiting, results = carry

        def advance(_, state):
            return where(busy & going(problems, state), step(problems, state), state)

        state = jax.lax.fori_loop(0, burst, advance, state)
        done = busy & ~going(problems, state)
        rows = result(state)
        follower = jnp.where(done, waiting + jnp.cumsum(done) - 1, index)
        if jax.default_backend() == "cpu":
            order = jnp.argsort(~done, stable=True)

            def swap(i, carry):
                problems, results = carry
                slot = order[i]
                source = jnp.minimum(follower[slot], length - 1)
                problems = jax.tree.map(lambda a, b: a.at[slot].set(b[source]), problems, queue)
                return problems, results.at[index[slot]].set(rows[slot])

            problems, results = jax.lax.fori_loop(0, jnp.sum(done), swap, (problems, results))
        else:
            results = results.at[jnp.where(done, index, length)].set(rows, mode="drop")
            source = jnp.minimum(follower, length - 1)
            problems = where(done, jax.tree.map(lambda a: a[source], queue), problems)
        busy = busy & (follower < count)
        return problems, where(done, begin(problems), state), follower, busy, waiting + jnp.sum(done), results

    problems = jax.tree.map(lambda a: a[:slots], queue)
    state = begin(problems)
    index = jnp.arange(slots)
    empty = jnp.zeros((length, *jax.eval_shape(result, state).shape[1:]))
    carry = (problems, state, index, index < count, jnp.asarray(slots), empty)
    return jax.lax.while_loop(lambda carry: jnp.any(carry[3]), round_, carry)[-1]
