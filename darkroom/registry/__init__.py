"""Who is up, what they hold and which models exist, in etcd under leases. Reconciles from state, never from events."""
