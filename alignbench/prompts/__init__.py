"""Prompt sets: where the prompts of training and evaluation come from.

Where it fits: the run draws an iteration's prompts from a set; the evaluation walks a set in order.
``prompt``  the record: id, text, GenEval metadata.
``sets``    the sets: the embedded world's captions, text files, JSONL files; and how an iteration draws from one.
``pairs``   preference data sets on disk, with Pick-a-Pic's columns.
``images``  real images with captions in a folder, for methods that learn from images instead of samples.
Gotchas: ids are stable, seeds are hashed from them; groups are matched by identity within an iteration, never by text.
"""
