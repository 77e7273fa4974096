"""What the hardware can do: facts, measured rates, memory and energy over time."""
