"""`jaxllm bench`: how fast an engine is on this machine, on random weights.

`latency` runs one batch again and again, `throughput` many prompts of many lengths,
`startup` processes from nothing to a first token. Each is a function that returns a
frozen value; `command` is all that knows of a command line, `report` of how things
look. A figure beside the roofline says what the machine itself would allow.
"""
