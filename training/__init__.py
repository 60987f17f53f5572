"""Learning to defer: from a base, experts and data to a gate that the server loads. ``docs/training.md`` is the guide.

Where things are: ``stages/`` holds the commands of ``collm train``, one file each; they use

- ``settings``, ``project``, ``data``, ``checkpoints``, ``files``: what is read, checked and written
- ``scoring``: what each model says of the gold tokens; ``losses/``: the losses on that; ``gate_only`` and ``joint``:
  what learns; ``fit``: the loop of both
- ``serving``: answers by the engine; ``thresholds``: the choice of one; ``auroc``, ``report``, ``plots``: figures
- ``convert``: the reference format; ``demo/``: the recipe of the shipped pair
"""
