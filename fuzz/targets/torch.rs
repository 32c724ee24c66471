//! A file of torch.save: as it is, and its pickle (or all of it taken as one) in an archive with correct lengths, which
//! random changes rarely leave right.
#![no_main]

use clearform_fuzz::open;
use libfuzzer_sys::fuzz_target;

const STORAGES: [&str; 3] = ["data/0", "data/1", "data/2"];
const STORAGE: [u8; 64] = [1; 64];

fuzz_target!(|bytes: &[u8]| {
    open("file.pt", bytes);
    open("file.pt", &archive(pickle(bytes)));
});

/// From the first protocol mark to the next zip signature.
fn pickle(bytes: &[u8]) -> &[u8] {
    if !bytes.starts_with(b"PK") {
        return bytes;
    }
    let find = |from: usize, what: &[u8]| bytes[from..].windows(what.len()).position(|window| window == what);
    let begin = find(0, b"\x80\x02").unwrap_or(0);
    let end = find(begin, b"PK").map_or(bytes.len(), |length| begin + length);
    &bytes[begin..end]
}

fn archive(pickle: &[u8]) -> Vec<u8> {
    let records = STORAGES.iter().map(|name| (*name, &STORAGE[..])).chain([("data.pkl", pickle)]);
    let (mut file, mut directory, mut count) = (Vec::new(), Vec::new(), 0u16);
    for (name, content) in records {
        let (name, at) = (format!("a/{name}"), file.len() as u32);
        let size = (content.len() as u32).to_le_bytes();
        let lengths = [&size[..], &size, &(name.len() as u16).to_le_bytes(), &[0; 2]].concat();
        file.extend([b"PK\x03\x04", &[0; 10][..], &lengths, name.as_bytes(), content].concat());
        directory
            .extend([b"PK\x01\x02", &[0; 12][..], &lengths, &[0; 10], &at.to_le_bytes(), name.as_bytes()].concat());
        count += 1;
    }
    let (at, length) = ((file.len() as u32).to_le_bytes(), (directory.len() as u32).to_le_bytes());
    let counts = [count.to_le_bytes(), count.to_le_bytes()].concat();
    [&file[..], &directory, b"PK\x05\x06\0\0\0\0", &counts, &length, &at, &[0; 2]].concat()
}
