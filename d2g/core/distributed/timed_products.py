"""The work that `process_count` times, in a process of its own, which it starts by the path of this file.

It prints `ready`. Then it answers each line of standard input, a number of seconds, with the matrix products
per second that it did meanwhile. It ends with its standard input. It imports numpy alone, whose start takes a
tenth of the time of torch's.
"""

import signal
import sys
import time

import numpy as np

SIZE = 512
"""Rows and columns: 0.27 GFLOP per product, 3 MiB of matrices, as a small convolution."""


def products_per_second(seconds: float) -> float:
    """Multiply fp32 matrices for so many seconds; the products per second."""
    left = np.random.default_rng(0).standard_normal((SIZE, SIZE), dtype=np.float32)
    product = left @ left  # the first product starts the library
    started, count = time.perf_counter(), 0
    while True:
        np.matmul(left, left, out=product)
        count += 1
        if (passed := time.perf_counter() - started) >= seconds:
            return count / passed


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and its end this process
    print("ready", flush=True)
    for line in sys.stdin:
        print(products_per_second(float(line)), flush=True)
