//! Decoded instructions, as plain data. `decode` makes them from PTX text, `warp` executes them.

use crate::convert::Convert;

/// One value for each lane of a warp, in the low bits.
pub type Lanes = [u64; WARP_SIZE];
/// Threads of a warp.
pub const WARP_SIZE: usize = 32;

/// Computes each lane's result from one operand.
pub type UnaryFn = fn(&Lanes) -> Lanes;
/// Computes each lane's result from two operands.
pub type BinaryFn = fn(&Lanes, &Lanes) -> Lanes;
/// Computes each lane's result from three operands.
pub type TernaryFn = fn(&Lanes, &Lanes, &Lanes) -> Lanes;
/// Computes the new value of a memory word from the old one and up to two operands.
pub type AtomicFn = fn(u64, u64, u64) -> u64;
/// Converts the 16 bits of an f16 or bf16.
pub type HalfToF32 = fn(u16) -> f32;

/// An instruction of a program.
pub struct Instruction {
    /// A predicate register and the value it must have; lanes where it has the other one skip the instruction.
    pub guard: Option<(u32, bool)>,
    /// What it does.
    pub operation: Operation,
    /// Registers that receive the results.
    pub to: Vec<u32>,
    /// Operands.
    pub from: Vec<Operand>,
    /// The PTX text, for error messages.
    pub text: String,
}

/// Where an operand's value comes from.
#[derive(Clone, Copy, Debug)]
pub enum Operand {
    /// A register.
    Register(u32),
    /// An immediate, the same in all lanes.
    Constant(u64),
    /// A special register.
    Special(SpecialRegister),
}

/// Special registers; the number is the axis, 0 to 2.
#[derive(Clone, Copy, Debug)]
pub enum SpecialRegister {
    /// `%tid`
    Tid(usize),
    /// `%ntid`
    Ntid(usize),
    /// `%ctaid`
    Ctaid(usize),
    /// `%nctaid`
    Nctaid(usize),
    /// `%laneid`
    LaneId,
}

/// State spaces of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// Kernel arguments.
    Parameter,
    /// Shared memory of the block.
    Shared,
    /// Local memory of the thread.
    Local,
    /// Global memory, or whichever space the address says.
    Generic,
}

/// The shape and layout of a `wgmma` product, (64 x 16) · (16 x `columns`).
#[derive(Clone, Copy, Debug)]
pub struct WgmmaShape {
    /// Columns of the right matrix.
    pub columns: usize,
    /// Reads an element.
    pub element: HalfToF32,
    /// Whether the left matrix is transposed in shared memory; none if it is in registers.
    pub left_transposed: Option<bool>,
    /// Whether the right matrix is transposed in shared memory.
    pub right_transposed: bool,
    /// Whether the product is subtracted.
    pub negated: bool,
}

/// What an instruction does. The first two operands of a memory access are an address and the offset added to it.
#[derive(Clone, Copy, Debug)]
pub enum Operation {
    /// Lane-wise, one operand.
    Unary(UnaryFn),
    /// Lane-wise, two operands.
    Binary(BinaryFn),
    /// Lane-wise, three operands.
    Ternary(TernaryFn),
    /// Applied to the low and high half of 32-bit registers, as in `fma.rn.bf16x2`.
    PerHalf(TernaryFn),
    /// A comparison, combined with a third operand if there is a function for that. A second result is its negation.
    Compare(BinaryFn, Option<BinaryFn>),
    /// A comparison that gives this value where it holds, else 0.
    Set(BinaryFn, u64),
    /// Conversion between number formats.
    Convert(Convert),
    /// Joins values of this many bits into one.
    Pack(u32),
    /// Splits a value into several of this many bits.
    Unpack(u32),
    /// `bfi`, in registers of this many bits.
    BitInsert(u64),
    /// Loads `bytes` for each result.
    Load {
        /// State space of the address.
        space: Space,
        /// Size of one value.
        bytes: u32,
        /// Whether to extend the sign.
        signed: bool,
    },
    /// Stores each operand from the third on.
    Store {
        /// State space of the address.
        space: Space,
        /// Size of one value.
        bytes: u32,
    },
    /// An atomic read-modify-write; the result is the old value.
    Atomic {
        /// State space of the address.
        space: Space,
        /// Size of the value.
        bytes: u32,
        /// Gives the new value.
        update: AtomicFn,
    },
    /// Jumps to the instruction of this index.
    Branch(usize),
    /// Ends the active lanes.
    Exit,
    /// `bar.sync`, or `bar.arrive` if it does not wait. Operands: number of the barrier and, optionally, of threads.
    Barrier {
        /// Whether the warp waits there.
        waits: bool,
    },
    /// `bar.warp.sync`, for the lanes in the operand's mask.
    WarpSync,
    /// `elect.sync`: one lane of the operand's mask.
    Elect,
    /// `mbarrier.init`
    InitBarrier(Space),
    /// `mbarrier.inval`
    InvalidateBarrier(Space),
    /// `mbarrier.arrive` and `mbarrier.expect_tx`. Operands: arrivals, expected bytes.
    ArriveBarrier(Space),
    /// `mbarrier.try_wait.parity` and `test_wait.parity`
    TestBarrier(Space),
    /// `cp.async.bulk.tensor` to shared memory. Operands: destination, tensor map, mbarrier, coordinates.
    BulkCopy,
    /// `wgmma.fence`
    WgmmaFence,
    /// `wgmma.mma_async`
    Wgmma(WgmmaShape),
    /// `wgmma.commit_group`
    WgmmaCommit,
    /// `wgmma.wait_group`, until this many groups are pending
    WgmmaWait(usize),
    /// `shfl.sync`. The function gives the source lane from a lane's number and the operands `b` and `c` of the manual.
    Shuffle(fn(u32, u32, u32) -> u32),
    /// `cp.async` of this many bytes. A fifth operand says how many of them to read; the rest becomes zeros.
    CopyAsync(u32),
    /// `cp.async.commit_group`
    CopyCommit,
    /// `cp.async.wait_group`, until this many groups are pending
    CopyWait(usize),
    /// `cp.async.wait_all`, which includes copies that are in no group
    CopyWaitAll,
    /// `ldmatrix` of this many 8 x 8 matrices, transposed or not
    LoadMatrices {
        /// Number of matrices.
        count: usize,
        /// Whether each is transposed.
        transposed: bool,
    },
    /// `mma.m16n8k16` with f32 sums
    Mma(HalfToF32),
    /// Ends the launch with this message: the program's own trap, or an instruction that is not simulated.
    Trap(&'static str),
    /// Does nothing.
    Nop,
}
