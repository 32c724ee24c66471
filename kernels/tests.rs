use super::{KERNELS, Kernel, Launch, Refusal, Scalar};
use super::{add_bias, clear_attention as attention, gated_add, gelu, modulated_layer_norm, permute, rms_norm_rope};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::mem::{offset_of, size_of};

const REPORT: &str = include_str!("registers.json");

fn report() -> Value {
    serde_json::from_str(REPORT).unwrap()
}

/// The register use of a kernel's entry points, as reported by ptxas.
fn usage(kernel: &Kernel) -> Value {
    report()[format!("{}.cu", kernel.name)].clone()
}

#[test]
fn kernels_are_in_alphabetical_order() {
    assert!(KERNELS.is_sorted_by_key(|kernel| kernel.name));
}

#[test]
fn committed_ptx_is_fresh() {
    for kernel in KERNELS {
        let digest = Sha256::digest(kernel.sources.concat());
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        let expected = format!("// sources sha256 {hex}");
        assert_eq!(kernel.ptx.lines().next(), Some(expected.as_str()), "{}: run build_ptx.py", kernel.name);
    }
}

#[test]
fn ptx_has_the_entry_points_of_its_source() {
    for kernel in KERNELS {
        let found: Vec<&str> = kernel.ptx.lines().filter_map(|line| line.strip_prefix(".visible .entry ")).collect();
        let count = kernel.entries().count();
        assert!(count > 0 && found.len() == count, "{}: {} of {count} entry points", kernel.name, found.len());
        for entry in kernel.entries() {
            assert!(found.iter().any(|line| line.strip_suffix('(') == Some(entry)), "{entry}");
        }
        assert!(kernel.ptx.contains(&format!(".target {}\n", kernel.target.name())), "{}", kernel.name);
    }
}

#[test]
fn no_register_is_spilled_and_register_counts_are_within_bounds() {
    assert_eq!(report().as_object().unwrap().len(), KERNELS.len());
    for kernel in KERNELS {
        let usage = usage(kernel);
        assert_eq!(usage.as_object().unwrap().len(), kernel.entries().count());
        for entry in kernel.entries() {
            let usage_of = |name: &str| usage[entry][name].as_u64().unwrap();
            assert_eq!([usage_of("stack"), usage_of("spill_stores"), usage_of("spill_loads")], [0; 3], "{entry}");
            assert!((1..=usage_of("at_most")).contains(&usage_of("registers")), "{entry}");
        }
    }
}

/// The C++ checks in checks/visit_lists.h and checks/rows.h assert the same sizes.
#[test]
fn parameters_have_the_layout_of_the_sources() {
    assert_eq!((size_of::<attention::WorkItem>(), size_of::<attention::ListEntry>()), (20, 12));
    assert_eq!(size_of::<attention::ListAddresses>(), 40);
    assert_eq!(
        (size_of::<attention::ForwardParameters>(), offset_of!(attention::ForwardParameters, scale)),
        (112, 108)
    );
    assert_eq!((size_of::<attention::WorkPair>(), size_of::<attention::TileVisit>()), (24, 12));
    assert_eq!(
        (size_of::<attention::PairedForwardParameters>(), offset_of!(attention::PairedForwardParameters, count)),
        (448, 384)
    );
    assert_eq!(
        (size_of::<attention::BackwardParameters>(), offset_of!(attention::BackwardParameters, scale)),
        (160, 156)
    );
    assert_eq!(size_of::<add_bias::AddBiasParameters>(), 32);
    assert_eq!(size_of::<gated_add::GatedAddParameters>(), 48);
    assert_eq!(size_of::<gelu::GeluParameters>(), 32);
    assert_eq!(size_of::<modulated_layer_norm::ModulatedLayerNormParameters>(), 56);
    assert_eq!(size_of::<permute::PermuteParameters>(), 40);
    let eps = offset_of!(rms_norm_rope::RmsNormRopeParameters, eps);
    assert_eq!((size_of::<rms_norm_rope::RmsNormRopeParameters>(), eps), (72, 68));
}

/// A launch of every kernel that this crate plans.
fn planned() -> Vec<Launch> {
    let positions: Vec<(i32, i32)> = (0..200).map(|token| (token / 20, token % 20)).collect();
    let text = attention::TextPadding::Whole(10);
    let sequence = attention::SequenceLayout { text, positions: &positions, pooled: 0, limit: Some(9) };
    let lists = attention::VisitLists::with_parts(&sequence, attention::ListRows::Queries, 2);
    let mut found = Vec::new();
    for scalar in [Scalar::Bf16, Scalar::F16] {
        for head_dim in [64, 128] {
            let problem = attention::KernelProblem::new(scalar, 2, 3, head_dim).unwrap();
            let pairs = attention::WorkPairs::new(&lists);
            found.extend([problem.forward(&lists), problem.paired_forward(&pairs), problem.merge(&lists)]);
            found.push(problem.delta(210).unwrap());
            found.extend(problem.query_gradient(&lists).into_iter().chain(problem.key_gradient(&lists)));
        }
    }
    for scalar in [Scalar::Bf16, Scalar::F16, Scalar::F32] {
        found.extend(gelu::launches(scalar, 1024).unwrap());
        found.extend(modulated_layer_norm::launches(scalar, 30, 3072).unwrap());
        found.extend(rms_norm_rope::launches(scalar, 30, 128).unwrap());
        found.extend([add_bias::launch(scalar, 30, 3072).unwrap(), gated_add::launch(scalar, 30, 3072).unwrap()]);
        found.push(permute::launch(scalar, 30, 3072).unwrap());
    }
    found
}

#[test]
fn launches_and_entry_points_are_the_same() {
    let planned: BTreeSet<String> = planned().into_iter().map(|launch| launch.entry).collect();
    let declared: BTreeSet<String> = KERNELS.iter().flat_map(|kernel| kernel.entries()).map(str::to_owned).collect();
    assert_eq!(planned, declared);
    assert!(self::planned().iter().all(|launch| launch.kernel.entries().any(|entry| entry == launch.entry)));
}

#[test]
fn launches_cover_the_problem() {
    let [norm, _] = modulated_layer_norm::launches(Scalar::Bf16, 30, 3072).unwrap();
    assert_eq!((norm.blocks, norm.shared_bytes), ([30, 1, 1], 64));
    let [rope, _] = rms_norm_rope::launches(Scalar::Bf16, 31, 40).unwrap();
    assert_eq!(rope.blocks, [31 * 8 / 128 + 1, 1, 1], "8 threads hold 5 x 16 bytes");
    let problem = attention::KernelProblem::new(Scalar::F16, 2, 3, 128).unwrap();
    let positions: Vec<(i32, i32)> = (0..4096).map(|token| (token / 64, token % 64)).collect();
    let sequence = attention::SequenceLayout {
        text: attention::TextPadding::Whole(0),
        positions: &positions,
        pooled: 0,
        limit: None,
    };
    let pairs = attention::WorkPairs::new(&attention::VisitLists::new(&sequence, attention::ListRows::Queries));
    let few = problem.paired_forward(&pairs);
    assert_eq!((few.blocks, few.threads, few.shared_bytes), ([32, 3, 2], 384, 6 * (2 * 16384 + 16)));
    let many = attention::KernelProblem::new(Scalar::Bf16, 4, 48, 64).unwrap().paired_forward(&pairs);
    assert_eq!(many.blocks, [32_u32.div_ceil(2), 48, 4], "6144 pairs: a block computes two");
    assert_eq!(problem.delta(100).unwrap().blocks, [2 * 100 * 3 * 16_u32.div_ceil(16) * 16 / 128, 1, 1]);
}

#[test]
fn unsupported_problems_are_refused() {
    assert_eq!(attention::KernelProblem::new(Scalar::F32, 1, 1, 64), Err(Refusal::Scalar { scalar: Scalar::F32 }));
    assert_eq!(attention::KernelProblem::new(Scalar::Bf16, 1, 1, 72), Err(Refusal::HeadDim { head_dim: 72 }));
    let width = |width, longest| Err(Refusal::Width { width, longest });
    assert_eq!(rms_norm_rope::launches(Scalar::F32, 1, 132), width(132, 128));
    assert_eq!(modulated_layer_norm::launches(Scalar::Bf16, 1, 4104), width(4104, 4096));
    assert_eq!(gelu::launches(Scalar::Bf16, 12), width(12, usize::MAX));
}

/// `build_ptx.py --check` compares its bytes; the device decides whether it is used.
#[test]
fn kernels_of_one_capability_come_as_machine_code_too() {
    for kernel in KERNELS {
        let Some(cubin) = kernel.cubin else {
            assert_eq!(kernel.target, super::Target::Sm80, "{}", kernel.name);
            continue;
        };
        assert!(cubin.starts_with(b"\x7fELF"), "{}", kernel.name);
        for entry in kernel.entries() {
            let name = entry.as_bytes();
            assert!(cubin.windows(name.len()).any(|bytes| bytes == name), "{entry}");
        }
    }
}

/// An image of 8192 x 8192 pixels in FLUX.1: 512 x 512 tokens and 512 of text, 24 heads of 128, an MLP of 12288 channels.
/// Grids stay within the device's limits, and what the kernels count in 32 bits fits there. Offsets in memory, which they
/// compute in 64 bits, are checked by checks/large.h.
#[test]
fn launches_of_8k_images_fit_the_device() {
    const TOKENS: usize = 512 * 512 + 512;
    let positions = attention::tests::patches(512, 512);
    let text = attention::TextPadding::Whole(512);
    let sequence = attention::SequenceLayout { text, positions: &positions, pooled: 0, limit: Some(256) };
    let [by_query, by_key] = [attention::ListRows::Queries, attention::ListRows::Keys]
        .map(|rows| attention::VisitLists::new(&sequence, rows));
    let pairs = attention::WorkPairs::new(&by_query);
    for batch in 1..=4 {
        let problem = attention::KernelProblem::new(Scalar::Bf16, batch, 24, 128).unwrap();
        let mut launches = vec![problem.forward(&by_query), problem.paired_forward(&pairs), problem.merge(&by_query)];
        launches.push(problem.delta(TOKENS).unwrap());
        launches.extend(problem.query_gradient(&by_query).into_iter().chain(problem.key_gradient(&by_key)));
        launches.extend(gelu::launches(Scalar::Bf16, batch * TOKENS * 12288).unwrap());
        launches.extend(modulated_layer_norm::launches(Scalar::Bf16, batch * TOKENS, 3072).unwrap());
        launches.extend(rms_norm_rope::launches(Scalar::Bf16, batch * TOKENS * 24, 128).unwrap());
        launches.push(add_bias::launch(Scalar::Bf16, batch * TOKENS, 12288).unwrap());
        launches.push(gated_add::launch(Scalar::Bf16, batch * TOKENS, 3072).unwrap());
        launches.push(permute::launch(Scalar::Bf16, batch * TOKENS, 3072).unwrap());
        for Launch { entry, blocks: [x, y, z], threads, .. } in launches {
            assert!(x <= i32::MAX as u32 && y <= 65535 && z <= 65535, "{entry}: {x} x {y} x {z} blocks");
            // `thread_number` of rows.cuh.
            assert!(u64::from(x) * u64::from(threads) <= u64::from(u32::MAX), "{entry}: {x} blocks of {threads}");
        }
    }
    let last = by_query.work.iter().chain(&by_key.work).map(|work| (work.first + work.count) as usize).max();
    assert_eq!(last, Some(TOKENS));
    assert!(by_query.masks.len() / 128 <= 24 && by_query.entries.len() < 200_000, "one mask per relative position");
}
