//! [`available_memory`]: what this process may still take, by the system, its control groups and its limits.

use std::fs::read_to_string;
use std::path::{Path, PathBuf};

/// Bytes that the process may still take; `None` where nothing says so.
pub(crate) fn available_memory() -> Option<u64> {
    let groups = read_to_string("/proc/self/cgroup").unwrap_or_default();
    let in_groups = group_folders(&groups).into_iter().filter_map(|folder| left_in_group(&folder));
    [free_memory(), left_of_address_space()].into_iter().flatten().chain(in_groups).min()
}

/// Free memory of the system, with what it caches of files (`MemAvailable`).
fn free_memory() -> Option<u64> {
    kilobytes(&read_to_string("/proc/meminfo").ok()?, "MemAvailable:")
}

/// What `ulimit -v` leaves.
fn left_of_address_space() -> Option<u64> {
    let limits = read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max address space"))?;
    let limit: u64 = line.split_whitespace().next()?.parse().ok()?;
    let taken = kilobytes(&read_to_string("/proc/self/status").ok()?, "VmSize:")?;
    Some(limit.saturating_sub(taken))
}

/// The value of `key` in a file of lines such as `VmSize:  1024 kB`, in bytes.
fn kilobytes(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}

/// The folders of the control groups of a process, whose `/proc/PID/cgroup` is `text`, and of the groups around them.
fn group_folders(text: &str) -> Vec<PathBuf> {
    let folder = |line: &str| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let root = match controllers {
            "" => Path::new("/sys/fs/cgroup").to_owned(),
            _ if controllers.split(',').any(|controller| controller == "memory") => "/sys/fs/cgroup/memory".into(),
            _ => return None,
        };
        Some((root.clone(), root.join(path.trim_start_matches('/'))))
    };
    let folders = text.lines().filter_map(folder);
    folders
        .flat_map(|(root, folder)| {
            let inside = folder.ancestors().take_while(|ancestor| ancestor.starts_with(&root));
            inside.map(Path::to_owned).collect::<Vec<_>>()
        })
        .collect()
}

/// What a control group leaves; what it caches of files can be dropped, and counts as free.
fn left_in_group(folder: &Path) -> Option<u64> {
    let number = |file: &str| read_to_string(folder.join(file)).ok()?.trim().parse::<u64>().ok();
    let limit = number("memory.max").or_else(|| number("memory.limit_in_bytes"))?;
    let taken = number("memory.current").or_else(|| number("memory.usage_in_bytes"))?;
    let stat = read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let cached = stat.lines().find_map(|line| line.strip_prefix("inactive_file ")?.parse::<u64>().ok());
    Some(limit.saturating_sub(taken.saturating_sub(cached.unwrap_or(0))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_of_both_versions_are_found_with_those_around_them() {
        let folders = group_folders("0::/user/session\n4:cpu:/x\n5:memory,pids:/docker\n");
        let expected = [
            "/sys/fs/cgroup/user/session",
            "/sys/fs/cgroup/user",
            "/sys/fs/cgroup",
            "/sys/fs/cgroup/memory/docker",
            "/sys/fs/cgroup/memory",
        ];
        assert_eq!(folders, expected.map(PathBuf::from));
    }

    #[test]
    fn a_group_leaves_its_limit_less_what_cannot_be_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| std::fs::write(folder.path().join(file), text).unwrap();
        write("memory.max", "1000\n");
        write("memory.current", "700\n");
        assert_eq!(left_in_group(folder.path()), Some(300));
        write("memory.stat", "anon 400\ninactive_file 250\n");
        assert_eq!(left_in_group(folder.path()), Some(550));
        write("memory.max", "max\n");
        assert_eq!(left_in_group(folder.path()), None);
    }

    #[test]
    fn this_process_may_take_something() {
        assert!(available_memory().is_none_or(|bytes| bytes > 1 << 20));
        assert_eq!(kilobytes("VmPeak:\t 5 kB\nVmSize:\t 12 kB\n", "VmSize:"), Some(12 << 10));
    }
}
