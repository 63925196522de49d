"""Rewards: named scores of images against their prompts.

Where it fits: the stack asks a reward for scores, in training and in evaluation; a reward never sees a method.
``reward``      the interface, weighted sums, images as a user sees them, the finiteness check.
``geneval``     GenEval's rules (official, strict, soft) over exchangeable detectors.
``text_image``  PickScore, CLIPScore, HPSv2.1: the similarity of image and text embeddings, differentiable.
``aesthetic``   the LAION aesthetic predictor, differentiable.
``jpeg``        the size of the image as a JPEG file.
``ocr``         whether a quoted text is written in the image.
``clip``        open_clip models and differentiable preprocessing; ``checkpoints`` finds and reads weights.
Gotchas: scores are on the raw scale, the key ``reward`` first; a differentiable reward gets images with gradients,
every other call gets images rounded to 8 bits, which is what a user would see.
"""
