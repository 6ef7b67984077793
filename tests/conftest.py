import signal

import torch

# The networks of the tests are small, and two threads that wait for each other on busy cores are slower than one.
torch.set_num_threads(1)

# A parent that ignores Ctrl-C, such as a shell's background job, would let every process of the tests ignore it too.
signal.signal(signal.SIGINT, signal.default_int_handler)
