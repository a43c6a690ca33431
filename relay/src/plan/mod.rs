//! What supervisor and workers tell each other in shared memory: rule records, header edits, counters, reasons, layouts.
//!
//! Plain data and its layout, so that neither side has to know the other. Must never act.

pub mod counters;
pub mod edit;
pub mod fate;
pub mod latency;
pub mod manifest;
pub mod planner;
pub mod records;
pub mod resolve;
pub mod status;
pub mod tap;
pub mod work;
