"""The path between noise and image, and the ways to walk it.

Where it fits: rollouts walk a time grid with these steps, losses stand on the same path; nothing here knows a model.
``flow``        the rectified-flow path (interpolate, target, clean estimate) and its time grids.
``solvers``     deterministic steps: euler, ddim, dpm1, dpm2; one signature, so that a rollout is one loop.
``stochastic``  steps with log-probabilities: flow, dance, cps; and the KL forms between two of them.
Gotchas: time 1 is noise and 0 the image; a grid decreases and ends in 0; sigma is per sample [B] or one value [].
Everything is float32 (or float64) whatever the model's autocast dtype, and differentiable in latents and velocity.
The last step of a rollout is always deterministic, hence at least two steps.
"""
