"""What `import diffalign` offers to Python and notebooks: the commands as functions that return what they made.

Options have the names and defaults of the command line. Nothing here computes: the work is that of `diffalign.jobs`.
"""
