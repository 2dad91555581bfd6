"""A user's reward that draws random numbers, and can end or signal its own process at a chosen moment."""

import os
import random
import signal
import threading

import numpy as np

calls = 0


def brightness(images, prompts, metadata):
    """Mean brightness with a little noise from two global generators.

    $MOMENT "SIGKILL 3 0.05" sends that signal to this process 0.05 s into the third call.
    """
    global calls
    calls += 1
    name, call, delay = os.environ.get("MOMENT", "none 0 0").split()
    if calls == int(call) and float(delay) == 0:
        os.kill(os.getpid(), signal.Signals[name])
    elif calls == int(call):
        threading.Timer(float(delay), os.kill, (os.getpid(), signal.Signals[name])).start()
    return [float(i.mean()) + 0.01 * np.random.rand() + 0.01 * random.random() for i in images]  # noqa: NPY002
