"""Placeholder until the operator lands: same signature, reference only."""

from m2rnn.ops import reference


def available_backends():
    return {"reference": None}


def m2rnn_scan(q, k, v, f, weight, *, initial_state=None, output_final_state=False, cu_seqlens=None, state_clip=None, backend=None):
    y, state = reference.scan(q, k, v, f, weight, initial_state, cu_seqlens, state_clip)
    return y, state if output_final_state else None


def m2rnn_step(q, k, v, f, weight, state):
    y, state = reference.scan(q[:, None], k[:, None], v[:, None], f[:, None], weight, state)
    return y[:, 0], state
