"""Prompt sets: where the prompts of training and evaluation come from.

Where it fits: the run draws an iteration's prompts from a set; the evaluation walks a set in order.
``prompt``  id, text, GenEval metadata.
``record``  the one schema of what files say of a prompt.
``sets``    the sets: the embedded world's captions, text files, JSONL files; and how an iteration draws from one.
``geneval`` GenEval's test prompts, and training prompts of its grammar that say nothing a test prompt says.
``hub``     prompts of data sets, on the hub or on disk.
``sampled`` folders of images that were sampled elsewhere, with their prompts.
``pairs``   preference data sets on disk, with Pick-a-Pic's columns.
``images``  real images with captions in a folder, for methods that learn from images instead of samples.
Gotchas: ids are stable, seeds are hashed from them; groups are matched by identity within an iteration, never by text.
"""
