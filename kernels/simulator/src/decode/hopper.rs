//! Instructions of compute capability 9.0: `mbarrier`, `elect`, bulk tensor copies, `wgmma`.

use super::Decoder;
use super::instructions::{Decoded, InstructionText, half_to_f32, space, without_operands};
use crate::instruction::{HalfToF32, Operand, Operation, WgmmaShape};
use crate::ptx::split_operands;

impl Decoder {
    /// `elect.sync %r1|%p1, mask`
    pub(super) fn elect(&mut self, text: &InstructionText) -> Decoded {
        let to = self.result_pair(text.operand(0)?)?;
        if to.len() != 2 {
            return Err(text.not_simulated());
        }
        Ok((Operation::Elect, to, self.operands(text, 1..2)?))
    }

    /// `setmaxnreg`. Registers are not limited here, so only the count is checked, and that all lanes get there.
    pub(super) fn register_limit(&mut self, text: &InstructionText) -> Decoded {
        let count: Option<u32> = text.operand(0)?.parse().ok();
        let operation = match count {
            Some(count) if count % 8 == 0 && (24..=256).contains(&count) => Operation::WarpSync,
            _ => Operation::Trap("the register count is not a multiple of 8 from 24 to 256"),
        };
        Ok((operation, vec![], vec![Operand::Constant(u64::from(u32::MAX))]))
    }

    /// `mbarrier`, for which [`crate::barriers::Barriers`] has the state.
    pub(super) fn mbarrier(&mut self, text: &InstructionText) -> Decoded {
        let space = space(&text.modifiers);
        let known = ["init", "inval", "arrive", "expect_tx", "try_wait", "test_wait", "parity", "noComplete"];
        let parts: Vec<&str> = known.into_iter().filter(|part| text.has(part)).collect();
        let has_result = matches!(parts[..], ["arrive", ..] | [.., "parity"]);
        let address_at = usize::from(has_result);
        let to = if has_result { vec![self.register(text.operand(0)?)?] } else { vec![] };
        let mut from = self.address(text.operand(address_at)?)?.to_vec();
        let mut arguments = self.operands(text, address_at + 1..text.operands.len())?;
        let operation = match parts[..] {
            ["init"] if arguments.len() == 1 => Operation::InitBarrier(space),
            ["inval"] => Operation::InvalidateBarrier(space),
            ["arrive"] => {
                let arrivals = arguments.first().copied().unwrap_or(Operand::Constant(1));
                arguments = vec![arrivals, Operand::Constant(0)];
                Operation::ArriveBarrier(space)
            }
            ["arrive", "expect_tx"] | ["expect_tx"] if arguments.len() == 1 => {
                let arrivals = u64::from(parts.len() == 2);
                arguments.insert(0, Operand::Constant(arrivals));
                Operation::ArriveBarrier(space)
            }
            // A time limit may follow the parity.
            ["try_wait" | "test_wait", "parity"] if !arguments.is_empty() => Operation::TestBarrier(space),
            _ => return Err(text.not_simulated()),
        };
        from.extend(arguments);
        Ok((operation, to, from))
    }

    /// `cp.async.bulk.tensor.2d… [to], [map, {x, y}], [barrier]`; a cache policy may follow and is ignored.
    pub(super) fn bulk_copy(&mut self, text: &InstructionText) -> Decoded {
        const COMPLETION: &str = "mbarrier::complete_tx::bytes";
        let simulated = match text.modifiers[..] {
            ["async", "bulk", "tensor", _, "shared::cluster" | "shared::cta", "global", ref rest @ ..] => {
                let allowed = ["tile", COMPLETION, "L2::cache_hint"];
                text.has(COMPLETION) && rest.iter().all(|modifier| allowed.contains(modifier))
            }
            _ => false,
        };
        let source = split_operands(text.operand(1)?.trim_start_matches('[').trim_end_matches(']'));
        let (true, [map, coordinates]) = (simulated, &source[..]) else { return Err(text.not_simulated()) };
        let mut from = self.address(text.operand(0)?)?.to_vec();
        from.extend(self.address(map)?);
        from.extend(self.address(text.operand(2)?)?);
        let coordinates = self.operand_list(coordinates)?;
        if text.modifiers[3] != format!("{}d", coordinates.len()) {
            return Err(text.not_simulated());
        }
        from.extend(coordinates);
        Ok((Operation::BulkCopy, vec![], from))
    }

    /// `wgmma.mma_async`, its fence and its groups.
    pub(super) fn wgmma(&mut self, text: &InstructionText) -> Decoded {
        match text.modifiers[..] {
            ["fence", "sync", "aligned"] => without_operands(Operation::WgmmaFence),
            ["commit_group", "sync", "aligned"] => without_operands(Operation::WgmmaCommit),
            ["wait_group", "sync", "aligned"] => {
                without_operands(Operation::WgmmaWait(text.require(text.operand(0)?.parse().ok())?))
            }
            ["mma_async", "sync", "aligned", shape, "f32", left, right] if left == right => {
                let columns = shape.strip_prefix("m64n").and_then(|shape| shape.strip_suffix("k16")?.parse().ok());
                let columns = text.require(columns)?;
                let element = text.require(half_to_f32(left))?;
                self.wgmma_product(text, columns, element)
            }
            _ => Err(text.not_simulated()),
        }
    }

    /// The operands are the sums; the left matrix, as registers or a descriptor; the right one's descriptor; whether to add
    /// to the sums; two signs; and whether each matrix in shared memory is transposed.
    fn wgmma_product(&mut self, text: &InstructionText, columns: usize, element: HalfToF32) -> Decoded {
        let to = self.register_list(text.operand(0)?)?;
        let mut from = self.operand_list(text.operand(1)?)?;
        let (left_transposed, last) = match from.len() {
            1 => (Some(flag(text, 6)?), 7),
            4 => (None, 6),
            _ => return Err(text.not_simulated()),
        };
        if !columns.is_multiple_of(8) || !(8..=256).contains(&columns) || to.len() * 2 != columns {
            return Err(text.not_simulated());
        }
        from.extend(self.operands(text, 2..4)?);
        let negated = is_negative(text, 4)? != is_negative(text, 5)?;
        let right_transposed = flag(text, last)?;
        let shape = WgmmaShape { columns, element, left_transposed, right_transposed, negated };
        Ok((Operation::Wgmma(shape), to, from))
    }
}

/// An immediate 0 or 1.
fn flag(text: &InstructionText, at: usize) -> Result<bool, String> {
    match text.operand(at)? {
        "0" => Ok(false),
        "1" => Ok(true),
        _ => Err(text.not_simulated()),
    }
}

/// An immediate 1 or -1.
fn is_negative(text: &InstructionText, at: usize) -> Result<bool, String> {
    match text.operand(at)? {
        "1" => Ok(false),
        "-1" => Ok(true),
        _ => Err(text.not_simulated()),
    }
}
