//! Headings of the option groups in `--help`. Every command lists its groups in this order: clap shows a heading where
//! the first option that has it is declared, so argument structs declare their options in this order too.

/// What is read, and how.
pub const INPUT: &str = "Input";
/// The attention plan.
pub const ATTENTION: &str = "Attention";
/// Training of the student.
pub const DISTILLATION: &str = "Distillation";
/// How images are generated.
pub const SAMPLING: &str = "Sampling";
/// LoRAs, ControlNets and the plugins that read them.
pub const ADAPTERS: &str = "Adapters";
/// What `bench` measures.
pub const TIMING: &str = "Timing";
/// What is written, and where.
pub const OUTPUT: &str = "Output";
/// Where and in which dtype a model runs.
pub const DEVICE: &str = "Device";
/// Options of every command.
pub const GENERAL: &str = "General";
