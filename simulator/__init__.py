"""A cluster on a virtual clock, fed by a trace: the services' own policies, without the services.

workload   requests of a trace or of the generator, compressed and shaped
costs      seconds and bytes: what components weigh, how fast each tier gives them, what a step takes
fitting    seconds by tier, from the load times that the trace publishes
clock      what happens when
links      transfers that share bandwidth
shelf      what a tier of a node holds
worker     a node with one accelerator: its tiers, its queue, its loads
fleet      how many workers are up, and where a new one starts
cluster    workers, one way to route and one plan; replays a workload
ours       Darkroom's policies, which know everything at once
live       the same as services run them: forecasts, and what each replica saw; what is calibrated
served     the same with plans and their orders
systems    ways to serve: Darkroom's policies, the baselines, the ablations, the limits
report     figures of a replay, tables, plots
"""
