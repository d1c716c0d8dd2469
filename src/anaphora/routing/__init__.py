"""Which replica answers: strategies over one interface, what they know of replicas, and a simulator to compare them. Pure."""
