"""The embedded world: scenes of coloured shapes, their captions, their images and an exact detector.

Where it fits: the default model, its prompts and its GenEval detector are made from this package; methods never see
it. What: `scenes` (what is there), `captions` (GenEval records, held-out split), `render` (pixels), `detector` (pixels
back to objects), `degrade` (worse pictures). Why: an exact reward that costs a millisecond makes reward hacking
measurable on a laptop.

Gotchas: y points down, and an object's x and y are the centre of its bounding box, not its centroid. GenEval forgives
extra objects, `exact_scene` does not: read them beside each other. These modules import numpy and scipy, never torch.
Single objects and counts have no unseen combinations: their test prompts are training prompts, flagged `seen`.
"""
