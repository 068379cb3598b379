//! What the probe and the tracer share: the layout of ring buffer events.
