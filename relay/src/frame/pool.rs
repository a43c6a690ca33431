//! The free frames of a worker, in shared memory so that a successor finds them.
/// Free frames.
#[derive(Debug)]
pub struct Pool;
