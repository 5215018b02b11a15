"""What is measured, how, and the recorded results. Nothing here is timed inside a test."""
