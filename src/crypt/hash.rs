//! The hashes that a LUKS header may name.

use sha1::digest::Digest;

use super::memory::Secret;

/// A hash that a LUKS header may name: all that QEMU offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hash {
    Md5,
    Ripemd160,
    Sha1,
    Sha224,
    Sha256,
    Sha384,
    Sha512,
    Sm3,
}

/// Calls a function that is generic over the hash.
macro_rules! with_hash {
    ($hash:expr, $call:ident($($argument:expr),*)) => {
        match $hash {
            Hash::Md5 => $call::<md5::Md5>($($argument),*),
            Hash::Ripemd160 => $call::<ripemd::Ripemd160>($($argument),*),
            Hash::Sha1 => $call::<sha1::Sha1>($($argument),*),
            Hash::Sha224 => $call::<sha2::Sha224>($($argument),*),
            Hash::Sha256 => $call::<sha2::Sha256>($($argument),*),
            Hash::Sha384 => $call::<sha2::Sha384>($($argument),*),
            Hash::Sha512 => $call::<sha2::Sha512>($($argument),*),
            Hash::Sm3 => $call::<sm3::Sm3>($($argument),*),
        }
    };
}

macro_rules! derive_with {
    ($hash:ty, $password:expr, $salt:expr, $rounds:expr, $into:expr) => {
        pbkdf2::pbkdf2_hmac::<$hash>($password, $salt, $rounds, $into)
    };
}

impl Hash {
    /// The hash of that name.
    pub(super) fn named(name: &str) -> Option<Hash> {
        Some(match name {
            "md5" => Hash::Md5,
            "ripemd160" => Hash::Ripemd160,
            "sha1" => Hash::Sha1,
            "sha224" => Hash::Sha224,
            "sha256" => Hash::Sha256,
            "sha384" => Hash::Sha384,
            "sha512" => Hash::Sha512,
            "sm3" => Hash::Sm3,
            _ => return None,
        })
    }

    /// Bytes of a digest.
    pub(super) fn length(self) -> usize {
        with_hash!(self, output_size())
    }

    /// The digest of `parts` one after the other.
    pub(super) fn digest(self, parts: &[&[u8]]) -> Secret {
        let mut into = Secret::zeroed(self.length());
        self.digest_into(parts, &mut into);
        into
    }

    /// The same into `into`, which is as long as a digest.
    pub(super) fn digest_into(self, parts: &[&[u8]], into: &mut [u8]) {
        with_hash!(self, digest_of(parts, into));
    }

    /// PBKDF2 with HMAC.
    pub(super) fn derive(self, password: &[u8], salt: &[u8], rounds: u32, into: &mut [u8]) {
        match self {
            Hash::Md5 => derive_with!(md5::Md5, password, salt, rounds, into),
            Hash::Ripemd160 => derive_with!(ripemd::Ripemd160, password, salt, rounds, into),
            Hash::Sha1 => derive_with!(sha1::Sha1, password, salt, rounds, into),
            Hash::Sha224 => derive_with!(sha2::Sha224, password, salt, rounds, into),
            Hash::Sha256 => derive_with!(sha2::Sha256, password, salt, rounds, into),
            Hash::Sha384 => derive_with!(sha2::Sha384, password, salt, rounds, into),
            Hash::Sha512 => derive_with!(sha2::Sha512, password, salt, rounds, into),
            Hash::Sm3 => derive_with!(sm3::Sm3, password, salt, rounds, into),
        }
    }
}

fn output_size<D: Digest>() -> usize {
    <D as Digest>::output_size()
}

fn digest_of<D: Digest>(parts: &[&[u8]], into: &mut [u8]) {
    let mut state = D::new();
    for part in parts {
        Digest::update(&mut state, part);
    }
    let mut digest = state.finalize();
    into.copy_from_slice(&digest);
    zeroize::Zeroize::zeroize(digest.as_mut_slice());
}
