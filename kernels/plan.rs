//! [`Launch`]: which entry point runs over how many blocks, as a pure function of the problem; a refusal says why.
//! Knows no driver.

use crate::Kernel;
use std::fmt;

/// Threads that work on one row or tile; of a block, where a kernel says nothing else.
pub const THREADS: u32 = 128;

/// Types of numbers that the kernels take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scalar {
    /// bfloat16.
    Bf16,
    /// float16.
    F16,
    /// float32.
    F32,
}

impl Scalar {
    /// As entry points spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
        }
    }

    /// Numbers in 16 bytes.
    pub const fn per_word(self) -> usize {
        if matches!(self, Self::F32) { 4 } else { 8 }
    }
}

/// One launch; none where a count of blocks is 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// Which source.
    pub kernel: Kernel,
    /// Its entry point.
    pub entry: String,
    /// Blocks along x, y and z.
    pub blocks: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
}

impl Launch {
    /// A launch of `threads` threads, without shared memory.
    pub(crate) fn flat(kernel: Kernel, entry: String, threads: usize) -> Result<Self, Refusal> {
        let blocks = u32::try_from(threads).map_err(|_| Refusal::TooLarge { threads })?.div_ceil(THREADS);
        Ok(Self { kernel, entry, blocks: [blocks, 1, 1], threads: THREADS, shared_bytes: 0 })
    }
}

/// Parameters of an entry point, laid out as its source has them.
///
/// # Safety
/// Only a `repr(C)` type of the same layout as the source's may be one.
pub unsafe trait KernelParameters: Copy {}

/// Why no kernel takes a problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// Attention takes heads of 64 and 128.
    HeadDim {
        /// What was asked for.
        head_dim: usize,
    },
    /// Attention takes bf16 and f16.
    Scalar {
        /// What was asked for.
        number: Scalar,
    },
    /// More threads than a launch numbers.
    TooLarge {
        /// What was asked for.
        threads: usize,
    },
    /// A row is not a whole number of 16 bytes, or longer than the kernel holds.
    Width {
        /// What was asked for.
        width: usize,
        /// The longest.
        longest: usize,
    },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::HeadDim { head_dim } => {
                write!(
                    f,
                    "no attention kernel for heads of {head_dim}: there are 64 and 128, which narrower ones fill with zeros"
                )
            }
            Self::Scalar { number } => write!(f, "no attention kernel in {}: there are bf16 and f16", number.name()),
            Self::TooLarge { threads } => write!(f, "{threads} threads: a launch numbers 2^32"),
            Self::Width { width, longest } => {
                write!(f, "rows of {width}: expected whole multiples of 16 bytes, at most {longest} numbers")
            }
        }
    }
}

impl std::error::Error for Refusal {}

/// Refuses rows that are not whole multiples of 16 bytes or longer than `longest`.
pub(crate) fn check_width(number: Scalar, width: usize, longest: usize) -> Result<(), Refusal> {
    if width > 0 && width <= longest && width.is_multiple_of(number.per_word()) {
        Ok(())
    } else {
        Err(Refusal::Width { width, longest })
    }
}
