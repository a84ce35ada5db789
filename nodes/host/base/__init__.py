"""What every folder of the host's room uses: weights, memory, the page, options."""
