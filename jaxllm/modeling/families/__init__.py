"""One file a family of architectures.

A family module has five names: `config_from_hf(hf) -> ModelConfig`, `build`,
`WEIGHTS`, `HANDLED_FIELDS` and `IGNORED_WEIGHTS`; `registry.Family` says what
each is. Adding a family is such a file and a line in `registry.ARCHITECTURES`.
"""
