"""Drop-ins for the published code of IMU (arXiv 2508.01620), one module per part of it.

Names, signatures and return types are those of the authors; names collide between the parts, so
there are four: ``classification``, ``reidentification``, ``markov`` and ``tofu``. Defects of theirs
are repaired, and come back by a keyword that each function names.
"""
