//! Helpers of the namespace tests (the namespaces themselves come from `relay::lab`).

pub mod golden;
