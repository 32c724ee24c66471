use super::{KERNELS, Kernel};
use serde_json::Value;
use sha2::{Digest, Sha256};

const REPORT: &str = include_str!("registers.json");

fn report() -> Value {
    serde_json::from_str(REPORT).unwrap()
}

/// What ptxas said of a kernel's entry points.
fn usage(kernel: &Kernel) -> Value {
    report()[format!("{}.cu", kernel.name)].clone()
}

#[test]
fn kernels_stand_in_alphabetical_order() {
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
fn ptx_holds_the_entry_points_of_its_source() {
    for kernel in KERNELS {
        let found: Vec<&str> = kernel.ptx.lines().filter_map(|line| line.strip_prefix(".visible .entry ")).collect();
        let count = kernel.entries().count();
        assert!(count > 0 && found.len() == count, "{}: {} of {count} entry points", kernel.name, found.len());
        for entry in kernel.entries() {
            assert!(found.iter().any(|line| line.strip_suffix('(') == Some(entry)), "{entry}");
        }
        assert!(kernel.ptx.contains(&format!(".target sm_{}\n", kernel.capability)), "{}", kernel.name);
    }
}

#[test]
fn nothing_is_spilled_and_registers_keep_their_bounds() {
    assert_eq!(report().as_object().unwrap().len(), KERNELS.len());
    for kernel in KERNELS {
        let usage = usage(kernel);
        assert_eq!(usage.as_object().unwrap().len(), kernel.entries().count());
        for entry in kernel.entries() {
            let number = |name: &str| usage[entry][name].as_u64().unwrap();
            assert_eq!([number("stack"), number("spill_stores"), number("spill_loads")], [0; 3], "{entry}");
            assert!((1..=number("at_most")).contains(&number("registers")), "{entry}");
        }
    }
}
