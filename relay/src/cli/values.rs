//! Values of arguments: words, durations, CPU lists, frame counts. Pure; every error says what would be right.

use clap::builder::{PossibleValuesParser, TypedValueParser};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

/// Largest CPU number a list may name, plus one (`cpu_set_t`, sched_setaffinity(2)).
pub const MAX_CPUS: usize = 1024;
/// Fewest frames per worker: below this the rings of a single port run dry at once.
const MIN_FRAMES: u32 = 1024;
/// Most frames per worker: 2 GiB.
const MAX_FRAMES: u32 = 1 << 20;

/// A parser of one of `words`, for [`clap`].
pub fn choice<T: Copy + Default + Send + Sync + 'static>(words: &'static [(&'static str, T)]) -> impl TypedValueParser<Value = T> {
    let names = words.iter().map(|(name, _)| *name);
    PossibleValuesParser::new(names).map(|word| words.iter().find(|(name, _)| *name == word).map(|(_, value)| *value).unwrap_or_default())
}

/// `500ms`, `5s`, `2m`, `1h`, `100us`, or `0`.
pub fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is not a duration: write a number and one of us, ms, s, m, h (500ms)");
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let (factor, base) = match unit {
        "us" => (1, Duration::from_micros as fn(u64) -> Duration),
        "ms" => (1, Duration::from_millis as _),
        "s" => (1, Duration::from_secs as _),
        "m" => (60, Duration::from_secs as _),
        "h" => (3600, Duration::from_secs as _),
        _ => return Err(wrong()),
    };
    number.checked_mul(factor).map(base).ok_or_else(wrong)
}

/// A duration that is not 0.
pub fn period(text: &str) -> Result<Duration, String> {
    let period = duration(text)?;
    if period.is_zero() { Err("must be longer than 0".into()) } else { Ok(period) }
}

/// `127.0.0.1:9464`, `[::1]:9464`, or `9464` for that port on the loopback.
pub fn listen_address(text: &str) -> Result<SocketAddr, String> {
    match text.strip_prefix(':').unwrap_or(text).parse::<u16>() {
        Ok(port) => Ok(SocketAddr::from((Ipv4Addr::LOCALHOST, port))),
        Err(_) => {
            text.parse().map_err(|_| format!("`{text}` is not an address: write ADDR:PORT, or a port for the loopback (127.0.0.1:9464)"))
        }
    }
}

/// CPU numbers of a list, ascending, each once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuList(pub Vec<usize>);

/// `0,2-3` as CPUs 0, 2 and 3.
pub fn cpu_list(text: &str) -> Result<CpuList, String> {
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (cpu(first, part)?, cpu(last, part)?);
        if first > last {
            return Err(format!("`{part}` runs backwards: write {last}-{first}"));
        }
        cpus.extend(first..=last);
    }
    cpus.sort_unstable();
    cpus.dedup();
    Ok(CpuList(cpus))
}

fn cpu(text: &str, part: &str) -> Result<usize, String> {
    let number = text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<usize>().ok()).flatten();
    match number {
        Some(number) if number < MAX_CPUS => Ok(number),
        Some(number) => Err(format!("CPU {number} is over the limit of {}", MAX_CPUS - 1)),
        None => Err(format!("`{part}` is not a CPU or a range of CPUs (0,2-3)")),
    }
}

/// Frames per worker: a power of two, because ring sizes are.
pub fn frames(text: &str) -> Result<u32, String> {
    match text.parse::<u32>() {
        Ok(number) if number.is_power_of_two() && (MIN_FRAMES..=MAX_FRAMES).contains(&number) => Ok(number),
        _ => Err(format!("must be a power of two from {MIN_FRAMES} to {MAX_FRAMES}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn durations() {
        let right = [("0", 0), ("1us", 1), ("500ms", 500_000), ("5s", 5_000_000), ("2m", 120_000_000), ("1h", 3_600_000_000)];
        for (text, micros) in right {
            assert_eq!(duration(text), Ok(Duration::from_micros(micros)), "{text}");
        }
        for text in ["", "5", "s", "-5s", "5 s", "5S", "1.5s", "5sx", "99999999999999999999s", "18446744073709551615h", "٥s"] {
            assert!(duration(text).is_err(), "{text}");
        }
        assert!(period("0").is_err() && period("0ms").is_err() && period("1ms").is_ok());
    }

    #[test]
    fn listen_addresses() {
        for (text, right) in [("9464", "127.0.0.1:9464"), (":9464", "127.0.0.1:9464"), ("0.0.0.0:1", "0.0.0.0:1"), ("[::1]:2", "[::1]:2")] {
            assert_eq!(listen_address(text).map(|address| address.to_string()), Ok(right.to_owned()));
        }
        assert!(listen_address("localhost").is_err() && listen_address("70000").is_err());
    }

    #[test]
    fn cpu_lists() {
        let right: [(&str, &[usize]); 5] =
            [("0", &[0]), ("0,2-3", &[0, 2, 3]), ("3,1,3", &[1, 3]), ("1-1", &[1]), ("2-4,3-5", &[2, 3, 4, 5])];
        for (text, cpus) in right {
            assert_eq!(cpu_list(text), Ok(CpuList(cpus.to_vec())), "{text}");
        }
        for text in ["", ",", "0,", "a", "-1", "1-", "3-2", "0-1-2", "1024", "0-99999999999", "+1", " 1", "0x1"] {
            assert!(cpu_list(text).is_err(), "{text}");
        }
    }

    #[test]
    fn frame_counts() {
        assert_eq!(frames("16384"), Ok(16_384));
        for text in ["0", "512", "1000", "16383", "2097152", "x", "-1024"] {
            assert!(frames(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".{0,40}") {
            let _ = (duration(&text), cpu_list(&text), frames(&text));
        }
    }
}
