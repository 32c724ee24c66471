//! Devices and dtypes on the command line.

use super::headings::DEVICE;
use clap::{Args, ValueEnum};
use clearform::ComputeDevice;

/// Data types a model can run or be stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DtypeArg {
    /// 32-bit float.
    F32,
    /// bfloat16.
    Bf16,
    /// 16-bit float.
    F16,
}

/// The device that a model runs on.
#[derive(Debug, Clone, Copy, Args)]
pub struct DeviceArgs {
    /// Device: `cpu`, or in a build with the feature `cuda` also `cuda:N` (`cuda` is `cuda:0`).
    #[arg(long, default_value = "cpu", value_name = "DEVICE", help_heading = DEVICE)]
    pub device: ComputeDevice,
}
