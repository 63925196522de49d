"""Trainable generators behind one interface.

A `Policy` turns texts into conditions, latents into predictions, latents into images and back, and owns the named
*views* of its weights: `current` is trained, `reference` is the base model, and methods add what their papers keep
(`old`, `sampling`, an average). A view is a set of tensors over one base; running one swaps pointers for the time of a
call, so nothing is copied, no adapter is switched and the trainable set never changes.

* `policy.py`: the interface, the embedding cache, the noise.
* `weights.py`: LoRA layers, full fine-tuning, views.
* `diffusers_policy.py`: what policies over diffusers pipelines share.
* `saved_pipeline.py`: where a checkpoint is, and whether it is whole.
* `stable_diffusion_3.py`: any diffusers Stable Diffusion 3 or 3.5 checkpoint.
* `flux.py`: FLUX.1-dev.
* `unet.py`: Stable Diffusion 1.5 and XL, which predict the noise.

Latents are in a flow's coordinates whatever the model: ``x_t = (1 - t) x_0 + t e``. What a model predicts there, and
how that becomes a velocity or a clean estimate, its `path` knows (`sampling/flow.py`).

Two calls of one policy must not overlap in threads: a view is a state of the module while its call runs.
"""
