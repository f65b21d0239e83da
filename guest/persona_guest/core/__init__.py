"""Pure decisions of the agent: values in, values out, no I/O."""
