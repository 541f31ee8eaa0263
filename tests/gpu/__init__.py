"""Tests that need a GPU, and how long they may take."""

# Seconds. Hosts differ: with a compiler in each of 16 processes, a test of 20 s has taken over 100.
TEST_TIMEOUT = 400
# For other processes, after what these take to start: the failure then says who did not answer.
RANKS_TIMEOUT = 280
