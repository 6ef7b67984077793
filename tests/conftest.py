import torch

# The networks of the tests are small, and two threads that wait for each other on busy cores are slower than one.
torch.set_num_threads(1)
