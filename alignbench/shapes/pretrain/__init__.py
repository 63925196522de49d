"""Training of the embedded world's own models, from rendered scenes alone.

Where it fits: it makes what `alignbench/shapes/checkpoints/` ships; nothing else imports it. What: the autoencoder and
the generator (a real `StableDiffusion3Pipeline`), the tiny PickScore and the second judge. Why: the benchmark's base
model has to be known to the last sample, imperfect on purpose and small enough for a repository.

Gotchas: every random number of a step is drawn from the seed and the step's number, so a resumed run equals an
uninterrupted one. The generator is trained *without* T5 tokens: sample it with ``max_sequence_length=0``.
"""
