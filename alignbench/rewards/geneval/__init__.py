"""GenEval: does an image hold the objects, counts, colours and relations that its prompt names?

``rules`` decides from detected objects (official, strict, soft) and aggregates; ``suite`` has the benchmark's
vocabulary, prompts and files; ``detectors`` find the objects and ``colours`` names their colours; ``reward`` makes it
trainable in the embedded world and ``photo`` on photographs; ``evaluate`` scores a folder of images and ``calibrate``
compares that with another scorer.

The evaluation metric ``geneval`` follows the *official* rule, the training reward ``geneval`` the *strict* one. A score
from one must not be compared with a score from the other. On photographs both are called ``geneval_hf``, because the
detector's weights are not the official scorer's.
"""
