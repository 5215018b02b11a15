"""What pictures show: the data of DCPO."""
