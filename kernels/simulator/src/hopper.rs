//! What the text of instructions means that devices of compute capability 9.0 have: barriers in shared memory, copies of
//! boxes, products of warpgroups.

use crate::decode::{Decoded, Written, number_of_bits, space};
use crate::instruction::{Operand, Operation};
use crate::products::Product;
use crate::program::Decoder;
use crate::text::split;

impl Decoder {
    /// `bar` and `barrier`, of a block or of a warp.
    pub(crate) fn of_threads(&mut self, written: &Written) -> Decoded {
        let operands = self.all(written, 0..written.operands.len())?;
        let operation = match written.modifiers.iter().find(|word| !matches!(**word, "cta" | "aligned")) {
            Some(&"sync") => Operation::Barrier(true),
            Some(&"arrive") => Operation::Barrier(false),
            Some(&"warp") => Operation::Meet,
            _ => return Err(written.unknown()),
        };
        Ok((operation, vec![], operands))
    }

    /// `elect.sync %r1|%p1, mask`
    pub(crate) fn election(&mut self, written: &Written) -> Decoded {
        let to = self.alternatives(written.operand(0)?)?;
        if to.len() != 2 {
            return Err(written.unknown());
        }
        Ok((Operation::Elect, to, self.all(written, 1..2)?))
    }

    /// How many registers a thread may have from here on, which is only checked.
    pub(crate) fn limit(&mut self, written: &Written) -> Decoded {
        let count: Option<u32> = written.operand(0)?.parse().ok();
        let operation = match count {
            Some(count) if count % 8 == 0 && (24..=256).contains(&count) => Operation::Meet,
            _ => Operation::Trap("registers are no multiple of 8 of 24 to 256"),
        };
        Ok((operation, vec![], vec![Operand::Constant(u64::from(u32::MAX))]))
    }

    /// `mbarrier`
    pub(crate) fn in_memory(&mut self, written: &Written) -> Decoded {
        let space = space(&written.modifiers);
        let parts: Vec<&str> =
            ["init", "inval", "arrive", "expect_tx", "try_wait", "test_wait", "parity", "noComplete"]
                .into_iter()
                .filter(|part| written.has(part))
                .collect();
        // Those that give something name it first.
        let first = usize::from(matches!(parts[..], ["arrive", ..] | [.., "parity"]));
        let to = if first == 1 { vec![self.register(written.operand(0)?)?] } else { vec![] };
        let mut from = self.address(written.operand(first)?)?.to_vec();
        let mut given = self.all(written, first + 1..written.operands.len())?;
        let operation = match parts[..] {
            ["init"] if given.len() == 1 => Operation::MakeBarrier(space),
            ["inval"] => Operation::DropBarrier(space),
            ["arrive"] => {
                given = vec![given.first().copied().unwrap_or(Operand::Constant(1)), Operand::Constant(0)];
                Operation::Arrive(space)
            }
            ["arrive", "expect_tx"] | ["expect_tx"] if given.len() == 1 => {
                let arrivals = u64::from(parts.len() == 2);
                given.insert(0, Operand::Constant(arrivals));
                Operation::Arrive(space)
            }
            // A time to wait at most may follow the parity.
            ["try_wait" | "test_wait", "parity"] if !given.is_empty() => Operation::TestBarrier(space),
            _ => return Err(written.unknown()),
        };
        from.extend(given);
        Ok((operation, to, from))
    }

    /// `cp.async.bulk.tensor.2d… [to], [map, {x, y}], [barrier]`; a policy for the cache may follow.
    pub(crate) fn box_copy(&mut self, written: &Written) -> Decoded {
        let known = match written.modifiers[..] {
            ["async", "bulk", "tensor", _, "shared::cluster" | "shared::cta", "global", ref rest @ ..] => {
                let others = ["tile", "mbarrier::complete_tx::bytes", "L2::cache_hint"];
                written.has(others[1]) && rest.iter().all(|word| others.contains(word))
            }
            _ => false,
        };
        let inside = split(written.operand(1)?.trim_start_matches('[').trim_end_matches(']'));
        let (true, [map, place]) = (known, &inside[..]) else { return Err(written.unknown()) };
        let mut from = self.address(written.operand(0)?)?.to_vec();
        from.extend(self.address(map)?);
        from.extend(self.address(written.operand(2)?)?);
        let place = self.operands_of(place)?;
        if written.modifiers[3] != format!("{}d", place.len()) {
            return Err(written.unknown());
        }
        from.extend(place);
        Ok((Operation::CopyBox, vec![], from))
    }

    /// `wgmma`
    pub(crate) fn of_warpgroup(&mut self, written: &Written) -> Decoded {
        let alone = |operation| Ok((operation, vec![], vec![]));
        match written.modifiers[..] {
            ["fence", "sync", "aligned"] => alone(Operation::FenceProducts),
            ["commit_group", "sync", "aligned"] => alone(Operation::CommitProducts),
            ["wait_group", "sync", "aligned"] => {
                alone(Operation::AwaitProducts(written.known(written.operand(0)?.parse().ok())?))
            }
            ["mma_async", "sync", "aligned", shape, "f32", left, right] if left == right => {
                let columns = shape.strip_prefix("m64n").and_then(|shape| shape.strip_suffix("k16")?.parse().ok());
                let number = number_of_bits(left);
                self.product(written, written.known(columns)?, written.known(number)?)
            }
            _ => Err(written.unknown()),
        }
    }

    /// Sums, the left factor's registers or descriptor, the right one's descriptor, whether to add, two signs, and which
    /// factors in shared memory are transposed.
    fn product(&mut self, written: &Written, columns: usize, number: fn(u16) -> f32) -> Decoded {
        let to = self.registers_of(written.operand(0)?)?;
        let mut from = self.operands_of(written.operand(1)?)?;
        let flag = |at: usize| match written.operand(at)? {
            "0" => Ok(false),
            "1" => Ok(true),
            _ => Err(written.unknown()),
        };
        let sign = |at: usize| match written.operand(at)? {
            "1" => Ok(false),
            "-1" => Ok(true),
            _ => Err(written.unknown()),
        };
        let (left_transposed, last) = match from.len() {
            1 => (Some(flag(6)?), 7),
            4 => (None, 6),
            _ => return Err(written.unknown()),
        };
        if !columns.is_multiple_of(8) || !(8..=256).contains(&columns) || to.len() * 2 != columns {
            return Err(written.unknown());
        }
        from.extend(self.all(written, 2..4)?);
        let negative = sign(4)? != sign(5)?;
        let product = Product { columns, number, left_transposed, right_transposed: flag(last)?, negative };
        Ok((Operation::BeginProduct(product), to, from))
    }
}
