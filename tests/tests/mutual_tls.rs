//! Who gets in: coordinator and workers know each other by certificates of one private CA.

use std::time::Duration;

use baton_tests::{Cluster, ClusterBuilder, TlsPem};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// A private CA, as an operator makes one.
struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap().pem();
        Self { certificate, issuer: Issuer::new(params, key) }
    }

    /// The identity of a host that is dialled by `name`, and trusts `trusted`.
    fn host(&self, name: &str, trusted: &Authority) -> TlsPem {
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        TlsPem {
            ca: trusted.certificate.clone(),
            certificate: params.signed_by(&key, &self.issuer).unwrap().pem(),
            private_key: key.serialize_pem(),
        }
    }
}

async fn start(authority: &Authority) -> Cluster {
    ClusterBuilder::sim().tls(authority.host("127.0.0.1", authority)).start().await.unwrap()
}

/// The cluster's file with another `[tls]`, or none, for a worker called `stranger` in place of
/// `decode-0`.
fn file_of_stranger(cluster: &Cluster, tls: Option<&TlsPem>) -> String {
    let directory = cluster.directory().join("stranger");
    let tls = tls.map_or(String::new(), |tls| tls.write_to(&directory).unwrap());
    let toml = cluster.config().unwrap();
    let (before, rest) = toml.split_once("[tls]").unwrap();
    let (_, after) = rest.split_once("\n\n").unwrap();
    format!("{before}{tls}\n{after}")
        .replace("\"decode-0\"", "\"stranger\"")
        .replace(&format!("127.0.0.1:{}", cluster.transfer_port("decode-0")), "127.0.0.1:0")
}

async fn serves_two(cluster: &Cluster) {
    let answer = cluster.complete("The baton passes from hand to hand.", 6).await;
    assert_eq!((answer.status, answer.path()), (200, "disaggregated"), "{}", answer.text);
    assert_eq!(cluster.metrics().await.sum("baton_workers", &[]), 2.0);
}

/// A worker that does not get in says why, and keeps trying; everybody else is served meanwhile.
async fn is_kept_out(cluster: &mut Cluster, tls: Option<&TlsPem>, why: &[&str]) {
    let toml = file_of_stranger(cluster, tls);
    cluster.start_worker_of(&toml, "stranger", "decode", "stranger").unwrap();
    for word in why {
        cluster.wait_for_log("stranger", word).await;
    }
    serves_two(cluster).await;
    let tries = |cluster: &Cluster| cluster.log("stranger").matches("trying again").count();
    let before = tries(cluster);
    let more = async {
        while tries(cluster) < before + 2 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), more).await.expect("it keeps trying");
    serves_two(cluster).await;
    assert!(!cluster.log("stranger").contains("attach: attached"), "it got in");
    cluster.terminate("stranger").unwrap();
}

#[tokio::test]
async fn workers_of_another_ca_or_of_none_stay_outside() {
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let mut cluster = start(&ours).await;
    serves_two(&cluster).await;

    // Knows us, and is not known to us.
    let unknown = theirs.host("127.0.0.1", &ours);
    let why = "its [tls] ca may not be the one that signed this worker's certificate";
    is_kept_out(&mut cluster, Some(&unknown), &["UnknownCA", why]).await;
    // Does not know us.
    let elsewhere = theirs.host("127.0.0.1", &theirs);
    is_kept_out(&mut cluster, Some(&elsewhere), &["UnknownIssuer"]).await;
    let why = "it may want TLS, and this worker's file has no [tls]";
    is_kept_out(&mut cluster, None, &[why]).await;

    // A worker of ours gets in where they did not.
    let known = ours.host("stranger", &ours);
    let toml = file_of_stranger(&cluster, Some(&known));
    cluster.start_worker_of(&toml, "stranger", "decode", "stranger").unwrap();
    cluster.wait_for_workers(3, Duration::from_secs(30)).await.unwrap();
}

#[tokio::test]
async fn a_coordinator_by_another_name_is_not_believed() {
    let ours = Authority::new("ours");
    let host = ours.host("coordinator.elsewhere", &ours);
    let cluster = ClusterBuilder::sim().tls(host).not_ready().start().await.unwrap();
    cluster.wait_for_log("prefill-0", "certificate not valid for name \"127.0.0.1\"").await;
    assert_eq!(cluster.metrics().await.sum("baton_workers", &[]), 0.0);
}

#[tokio::test]
async fn a_worker_with_tls_says_so_of_a_coordinator_without() {
    let ours = Authority::new("ours");
    let mut cluster = ClusterBuilder::sim().start().await.unwrap();
    let tls = ours.host("127.0.0.1", &ours).write_to(&cluster.directory().join("tls")).unwrap();
    let toml = cluster.config().unwrap().replace("[engine]", &format!("{tls}\n[engine]"));
    let toml = toml
        .replace("\"decode-0\"", "\"stranger\"")
        .replace(&format!("127.0.0.1:{}", cluster.transfer_port("decode-0")), "127.0.0.1:0");
    cluster.start_worker_of(&toml, "stranger", "decode", "stranger").unwrap();
    cluster.wait_for_log("stranger", "corrupt message").await;
    serves_two(&cluster).await;
}

#[tokio::test]
async fn plaintext_strangers_are_hung_up_on() {
    let mut cluster = start(&Authority::new("ours")).await;
    let address = ("127.0.0.1", cluster.workers_port());
    for words in [
        &b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"[..],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        &[0x16, 3, 1, 0xff, 0xff, 0],
        &[],
    ] {
        let mut stranger = TcpStream::connect(address).await.unwrap();
        stranger.write_all(words).await.unwrap();
        stranger.shutdown().await.unwrap();
        let mut answer = Vec::new();
        let read = stranger.read_to_end(&mut answer);
        // An end of whichever kind: a hang-up may come as a reset.
        let _ = tokio::time::timeout(Duration::from_secs(30), read).await.expect("a hang-up");
        assert!(!answer.starts_with(b"HTTP/"), "{answer:?}");
    }
    // One who says nothing at all holds nobody up.
    let silent = TcpStream::connect(address).await.unwrap();
    cluster.kill("decode-0");
    cluster.eventually("it is gone", |m| m.sum("baton_workers", &[]) == 1.0).await;
    cluster.start_process("decode-0").unwrap();
    cluster.wait_for_workers(2, Duration::from_secs(30)).await.unwrap();
    serves_two(&cluster).await;
    drop(silent);
}
