"""Parameters that are spread over ranks: whole-tensor sums, and what several ranks must agree on.

`sharding` is what a step calls. It reads `placement` (who holds what) and `agreement` (do all have the same).
`dtensors` gets at this rank's memory; `foreign` notices shards that do not say so; `selftest` is a program. Buckets are
known by their protocol only.
"""
