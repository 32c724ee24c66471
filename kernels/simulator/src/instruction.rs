//! What an instruction is once its text is understood.

use crate::products::Product;

/// One value for each lane of a warp, in the low bits.
pub type Lanes = [u64; WARP];
/// How many threads work in step.
pub const WARP: usize = 32;

/// An instruction, for the lanes for which its guard holds.
pub struct Instruction {
    /// A register, and what it must be.
    pub guard: Option<(u32, bool)>,
    /// What it does.
    pub operation: Operation,
    /// Its results.
    pub to: Vec<u32>,
    /// What it works on.
    pub from: Vec<Operand>,
    /// As written, for messages.
    pub text: String,
}

/// Where a value comes from.
#[derive(Clone, Copy, Debug)]
pub enum Operand {
    /// A register.
    Register(u32),
    /// The same for all.
    Constant(u64),
    /// Where in its grid a thread stands.
    Special(Special),
}

/// Special registers. The number is the axis.
#[derive(Clone, Copy, Debug)]
pub enum Special {
    /// `%tid`
    Thread(usize),
    /// `%ntid`
    Threads(usize),
    /// `%ctaid`
    Block(usize),
    /// `%nctaid`
    Blocks(usize),
    /// `%laneid`
    Lane,
}

/// State spaces of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// The arguments of the launch.
    Parameter,
    /// Of the block.
    Shared,
    /// Of the thread.
    Local,
    /// Whatever the address says.
    Generic,
}

/// What instructions do. Those on memory have an address and what is added to it as their first two operands.
#[derive(Clone, Copy, Debug)]
pub enum Operation {
    /// On each lane alone, from one value to one.
    One(fn(&Lanes) -> Lanes),
    /// From two.
    Two(fn(&Lanes, &Lanes) -> Lanes),
    /// From three.
    Three(fn(&Lanes, &Lanes, &Lanes) -> Lanes),
    /// On both halves of a register, `fma.rn.bf16x2` for one.
    Halves(fn(&Lanes, &Lanes, &Lanes) -> Lanes),
    /// A comparison whose result is joined with a third operand, if there is one; the second result is its opposite.
    Compare(fn(&Lanes, &Lanes) -> Lanes, Option<fn(&Lanes, &Lanes) -> Lanes>),
    /// A comparison that gives this where it holds.
    Set(fn(&Lanes, &Lanes) -> Lanes, u64),
    /// Between number formats.
    Convert(crate::convert::Convert),
    /// Several values of so many bits to one, or one to several.
    Pack(u32),
    /// See [`Operation::Pack`].
    Unpack(u32),
    /// Bits of one value put into another, in registers of so many.
    Insert(u64),
    /// So many bytes for each result, the sign extended.
    Load(Space, u32, bool),
    /// So many bytes of each operand from the third on.
    Store(Space, u32),
    /// The value at the address becomes a function of it and the operands; it is itself the result.
    Atomic(Space, u32, fn(u64, u64, u64) -> u64),
    /// To where lanes that reach it go on.
    Branch(usize),
    /// Lanes that reach it end.
    Exit,
    /// At a barrier of threads, by its number and for how many threads; waits there, or only arrives.
    Barrier(bool),
    /// Lanes named by the operand meet.
    Meet,
    /// The lowest lane of those named by the operand: its number, and for whom it holds.
    Elect,
    /// A word of shared memory becomes a barrier for so many arrivals.
    MakeBarrier(Space),
    /// It is none any more.
    DropBarrier(Space),
    /// So many arrivals at it, and so many bytes more that are to come.
    Arrive(Space),
    /// Whether its phase of this parity is over.
    TestBarrier(Space),
    /// A box of a tensor to shared memory, as late as may be: to where, by which map, with which barrier, from where.
    CopyBox,
    /// Registers written so far may be used by products.
    FenceProducts,
    /// A product of a warpgroup begins.
    BeginProduct(Product),
    /// Products begun so far are a group.
    CommitProducts,
    /// Until so few groups are under way.
    AwaitProducts(usize),
    /// Another lane's value: from which one, of a lane, the operand and the clamp.
    Shuffle(fn(u32, u32, u32) -> u32),
    /// So many bytes to shared memory, as late as may be; fewer are taken where a fifth operand says so, zeros then.
    CopyAsync(u32),
    /// Copies begun so far are a group.
    Commit,
    /// Until so few groups are under way.
    Wait(usize),
    /// So many matrices of 8 x 8, transposed or not.
    LoadMatrices(usize, bool),
    /// A product of 16 x 16 and 16 x 8, of what the function makes numbers.
    MultiplyAdd(fn(u16) -> f32),
    /// Not to be reached: the program's own trap, a call, or what is not simulated.
    Trap(&'static str),
    /// Nothing.
    Nothing,
}
