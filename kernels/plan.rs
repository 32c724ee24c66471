//! [`Launch`]: an entry point and its grid, computed from the size of a problem, or a [`Refusal`] with the reason.

use crate::Kernel;
use std::fmt;

/// Threads of a block, unless a kernel has others; in the kernels over tiles or long rows, one block computes one of
/// them.
pub const THREADS: u32 = 128;

/// Dtypes that the kernels support.
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
    /// Its name in entry points.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
        }
    }

    /// Elements in 16 bytes, which is one vector load.
    pub const fn elements_per_word(self) -> usize {
        if matches!(self, Self::F32) { 4 } else { 8 }
    }
}

/// One launch. With a block count of 0 nothing is launched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// The kernel.
    pub kernel: Kernel,
    /// Its entry point.
    pub entry: String,
    /// Blocks along x, y and z.
    pub blocks: [u32; 3],
    /// Threads per block.
    pub threads: u32,
    /// Dynamic shared memory per block, in bytes.
    pub shared_bytes: u32,
}

impl Launch {
    /// A launch of at least `threads` threads along x, without shared memory.
    pub(crate) fn flat(kernel: Kernel, entry: String, threads: usize) -> Result<Self, Refusal> {
        let blocks = u32::try_from(threads).map_err(|_| Refusal::TooLarge { threads })?.div_ceil(THREADS);
        Ok(Self { kernel, entry, blocks: [blocks, 1, 1], threads: THREADS, shared_bytes: 0 })
    }
}

/// Parameters of an entry point, with the layout of its source.
///
/// # Safety
/// The type is `repr(C)` and has the layout of the source.
pub unsafe trait KernelParameters: Copy {}

/// Why no kernel supports a problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// Attention supports heads of 64 and 128.
    HeadDim {
        /// The requested value.
        head_dim: usize,
    },
    /// Attention supports bf16 and f16.
    Scalar {
        /// The requested value.
        scalar: Scalar,
    },
    /// More threads than a launch can index.
    TooLarge {
        /// The requested value.
        threads: usize,
    },
    /// A row that is not a multiple of 16 bytes, or longer than the kernel supports.
    Width {
        /// The requested value.
        width: usize,
        /// The longest supported row.
        longest: usize,
    },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::HeadDim { head_dim } => {
                write!(
                    f,
                    "no attention kernel for head_dim {head_dim}: expected 64 or 128, to which smaller heads are padded"
                )
            }
            Self::Scalar { scalar } => write!(f, "no attention kernel for {}: expected bf16 or f16", scalar.name()),
            Self::TooLarge { threads } => write!(f, "{threads} threads: expected fewer than 2^32 in one launch"),
            Self::Width { width, longest } => {
                write!(f, "rows of {width} elements: expected a multiple of 16 bytes, at most {longest} elements")
            }
        }
    }
}

impl std::error::Error for Refusal {}

/// Refuses rows that are not multiples of 16 bytes or are longer than `longest` elements.
pub(crate) fn check_width(scalar: Scalar, width: usize, longest: usize) -> Result<(), Refusal> {
    if width > 0 && width <= longest && width.is_multiple_of(scalar.elements_per_word()) {
        Ok(())
    } else {
        Err(Refusal::Width { width, longest })
    }
}
