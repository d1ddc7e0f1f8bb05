"""Update rules: a file a rule, whose `Config` is all that must be written (see docs/extend.md).

`Config.build(rate, decay, dims)` gives an `optax.GradientTransformation` of the weights. `rate` is
a schedule that ignores the count it is given: it knows the rate of the step. `decay` adds what
pulls maps to zero to an update that has not met the rate yet. `dims` names every weight's
dimensions; `training.names` says what follows from them. A rule whose best weights are not those
it trains has `Config.evaluated(state, params)` too.

A rule is chosen by its file's name, `optimizer.rule=lion`.
"""
