//! The page in a browser: what it shows, to whom, by which keys and on which screens.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

mod alerts;
#[path = "../support/mod.rs"]
mod support;
mod world;

use aegis_browser::Page;
use serde_json::{Value, json};
use support::T0;
use support::objects::NASTY;
use world::{NOW, SILENT_AFTER, World};

/// Signs in as somebody whose token is remembered by the tab, and opens a view.
async fn signed(world: &World, page: &mut Page, token: &str, view: &str) {
    let remember =
        format!("location.protocol === 'http:' && sessionStorage.setItem('aegis-token', {})", json!(token));
    page.call("Page.addScriptToEvaluateOnNewDocument", json!({ "source": remember })).await;
    // From elsewhere, so that it is loaded anew.
    page.go("about:blank").await;
    page.go(&format!("{}/{view}", world.url)).await;
    page.until("location.pathname === '/'").await;
    page.until(
        "document.querySelector('main h1') && document.getElementById('live').textContent.startsWith('Live')",
    )
    .await;
}

async fn lines(page: &mut Page, selector: &str) -> Vec<String> {
    let all = page
        .value(&format!("[...document.querySelectorAll({})].map((it) => it.textContent)", json!(selector)))
        .await;
    all.as_array().unwrap().iter().map(|it| it.as_str().unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_signs_in_by_token_and_out() {
    let (world, mut page) = (World::start().await, Page::open().await);
    page.go(&format!("{}/", world.url)).await;
    page.until("document.getElementById('token')").await;
    let form = page.text("document.querySelector('main').textContent").await;
    assert!(form.contains("kubectl create token NAME -n NAMESPACE --audience aegis-collector"), "{form}");
    page.picture("sign-in").await;
    // A token that is over says when it ended.
    let claims = "eyJzdWIiOiJzeXN0ZW06c2VydmljZWFjY291bnQ6c2hvcDpyZWFkZXIiLCJleHAiOjE3MDAwMDI4MDB9";
    for (token, said) in
        [("garbage", "The token is refused"), (&*format!("e30.{claims}.x"), "expired at 2023-11-14 23:00:00")]
    {
        page.until("document.activeElement.id === 'token'").await;
        page.write(token).await;
        page.key("Enter").await;
        page.until(&format!("document.getElementById('said').textContent.includes({})", json!(said))).await;
        assert_eq!(page.value("sessionStorage.length").await, 0, "it is not kept");
    }
    page.write("lost").await;
    page.key("Enter").await;
    page.until("document.getElementById('said').textContent.includes('cannot be checked at the moment')")
        .await;
    page.write("admin").await;
    page.key("Enter").await;
    page.until("document.querySelector('#list tbody')").await;
    assert_eq!(page.value("localStorage.length + document.cookie.length").await, 0);
    // A token that ends while one looks.
    page.value("sessionStorage.setItem('aegis-token', 'ended')").await;
    page.value("location.hash = '#/policies'").await;
    page.until("document.querySelector('.sign .notice.bad')").await;
    page.write("admin").await;
    page.key("Enter").await;
    page.until("document.querySelector('#policies tbody')").await;
    page.value("document.getElementById('out').click()").await;
    page.until("document.getElementById('token')").await;
    assert_eq!(page.value("sessionStorage.length").await, 0);
    assert_eq!(page.wrongs(&world.url, "the server responded with a status of").await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_are_listed_by_fill() {
    let (world, mut page) = (World::start().await, Page::open().await);
    signed(&world, &mut page, "admin", "#/accounts").await;
    page.until("document.querySelectorAll('#list tbody tr').length === 4").await;
    let names = lines(&mut page, "#list tbody th").await;
    assert_eq!(names, ["203.0.113.77", "192.0.2.1", "2001:db8:1:2::/64", "partner"]);
    let rows = lines(&mut page, "#list tbody tr").await;
    assert!(rows[0].contains("4,242 of 2,048 ports, y-node"), "{}", rows[0]);
    assert!(rows[0].contains("full"), "{}", rows[0]);
    // 500 of 512 ports, of the node with the strange name; n4 says nothing since T0 + 3,000 s, n3 holds nothing.
    assert!(rows[1].contains("97 % 500 of 512 ports, <script>"), "{}", rows[1]);
    assert!(
        rows[1].contains("n4: no report since 2023-11-14 23:50:00") && !rows[1].contains("n3"),
        "{}",
        rows[1]
    );
    assert!(rows[2].contains("no ports to share"), "{}", rows[2]);
    assert!(rows[3].contains("NoFreeAddress") && rows[3].contains("no free address"), "{}", rows[3]);
    let sum = page.text("document.getElementById('sum').textContent").await;
    assert_eq!(sum, "3 accounts, 3 addresses, ◆ 2 above the plan, ▲ 1 node silent.");
    page.value("document.getElementById('filter').focus()").await;
    page.write("203.0").await;
    page.until("document.querySelectorAll('#list tbody tr').length === 1").await;
    page.picture("accounts-filtered").await;
    assert_eq!(page.wrongs(&world.url, "").await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_strip_shows_who_holds_what_and_how_full() {
    let (world, mut page) = (World::start().await, Page::open().await);
    signed(&world, &mut page, "account-x", "#/address/192.0.2.1").await;
    page.until("document.querySelectorAll('[role=option]').length === 252").await;
    let holders = page
        .value("[...document.querySelectorAll('[role=option]')].map((it) => it.dataset.node ?? '')")
        .await;
    for (at, node) in holders.as_array().unwrap().iter().enumerate() {
        let expected = match at + 4 {
            4..=11 => "n1",
            12..=21 => "n2",
            22 => "n3",
            30..=33 => "n4",
            40..=41 => NASTY,
            _ => "",
        };
        assert_eq!(node, expected, "slice {}", at + 4);
    }
    let cell = |slice: u32| format!("document.querySelector('[data-slice=\"{slice}\"]')");
    let newest = world.stored("198.51.100.1:443", (NOW - 60, NOW), 10, "n1");
    let most = newest.values().copied().fold(0.0, f64::max);
    let share = (most / 2_048.0 * 100.0) as i64;
    let mut label = async |slice| page.text(&format!("{}.getAttribute('aria-label')", cell(slice))).await;
    let of_n1 = label(4).await;
    assert!(
        of_n1.starts_with("Slice 4, ports 1024 to 1279: held by n1 of site x-site; the node uses "),
        "{of_n1}"
    );
    assert!(
        of_n1.contains(&format!("of its 2,048 ports towards 198.51.100.1:443 tcp ({share} %)")),
        "{of_n1} {most}"
    );
    assert!(
        label(20)
            .await
            .starts_with("Slice 20, ports 5120 to 5375: draining, by n2 of site x-site; the node uses")
    );
    assert_eq!(
        label(22).await,
        "Slice 22, ports 5632 to 5887: quarantined until 00:06:40, last held by n3 of site x-site"
    );
    assert_eq!(
        label(30).await,
        "Slice 30, ports 7680 to 7935: held by n4 of site x-site; no report since 2023-11-14 23:50:00"
    );
    assert_eq!(label(50).await, "Slice 50, ports 12800 to 13055: free");
    assert_eq!(label(255).await, "Slice 255, ports 65280 to 65535: not used by the allocation");
    // Neither state nor fill is told by colour alone.
    let kind = page.value("[4, 20, 22, 30, 40, 50, 255].map((it) => document.querySelector(`[data-slice=\"${it}\"]`).className)").await;
    let grade = if most / 2_048.0 >= 0.8 { "over" } else { "under" };
    let expected = [
        &*format!("cell held {grade} begins"),
        "cell draining under begins",
        "cell quarantined begins",
        "cell held unknown begins",
        "cell held over begins",
        "cell free",
        "cell unused",
    ];
    assert_eq!(kind, json!(expected));
    let height = page.text(&format!("{}.querySelector('i').style.height", cell(40))).await;
    assert_eq!(height, "98%");
    let letter = page.text(&format!("{}.textContent", cell(4))).await;
    assert_eq!(letter, "B", "the node with the strange name comes first");
    let rows = lines(&mut page, "#as-table tbody tr").await;
    assert_eq!(rows.len(), 6);
    assert_eq!(rows[3], "225632 to 5887n3x-siteQuarantined until 00:06:40");
    // A /64 has numbers of nodes, and no ports.
    page.value("location.hash = '#/address/2001%3Adb8%3A1%3A2%3A%3A%2F64'").await;
    page.until("document.querySelector('h1').textContent.startsWith('2001') && document.querySelector('[data-slice=\"5\"]')?.dataset.node === 'n1'").await;
    let of_six = page.text(&format!("{}.getAttribute('aria-label')", cell(5))).await;
    assert_eq!(of_six, "Slice 5: number of a node: held by n1 of site x-site; ports do not limit it");
    // So flows that begin are plotted, those of each ten seconds.
    page.until("document.querySelector('figure[data-key=\"[2001:db8:9::1]:443 tcp\"] .line')").await;
    let told = numbers(&mut page, "[2001:db8:9::1]:443 tcp").await;
    let slot = |at: i64| ((at - T0) / 10 % 7) as f64;
    assert!(told.iter().all(|(at, value)| *value == Some(slot(*at))), "{told:?}");
    let sum = page.text("document.querySelector('figure p').textContent").await;
    assert!(sum.ends_with("highest 6 flows"), "{sum}");
    let caption = page.text("document.getElementById('caption').textContent").await;
    assert_eq!(
        caption,
        "Flows that began of all nodes together; each point is those of 10 seconds. Ports do not limit a /64."
    );
    assert_eq!(page.wrongs(&world.url, "").await, [""; 0]);
}

/// Numbers of a plot as its table has them.
async fn numbers(page: &mut Page, key: &str) -> Vec<(i64, Option<f64>)> {
    let figure = format!("document.querySelector('figure[data-key=\"{key}\"]')");
    page.value(&format!("{figure}.querySelector('details').open = true")).await;
    page.until(&format!("{figure}.querySelector('tbody')")).await;
    let rows = page
        .value(&format!(
            "[...{figure}.querySelectorAll('tbody tr')].map((it) => [it.dataset.at, it.dataset.value])"
        ))
        .await;
    let read =
        |row: &Value| (row[0].as_str().unwrap().parse().unwrap(), row[1].as_str().unwrap().parse().ok());
    rows.as_array().unwrap().iter().map(read).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn plots_show_what_the_store_has_and_the_plan() {
    let (world, mut page) = (World::start().await, Page::open().await);
    signed(&world, &mut page, "account-x", "#/address/192.0.2.1").await;
    page.until("document.querySelectorAll('.plot .line').length >= 3").await;
    // Ports of slices that nodes hold or drain: 8 + 10 + 4 + 2.
    let held = 24.0 * 256.0;
    for (node, planned, step, window) in [
        ("", 0.8 * held, 10, "10 min"),
        ("n2", 0.8 * 10.0 * 256.0, 10, "10 min"),
        ("n2", 0.8 * 10.0 * 256.0, 60, "1 hour"),
    ] {
        page.value(&format!("(() => {{ const it = document.getElementById('node'); it.value = '{node}'; it.dispatchEvent(new Event('change', {{bubbles: true}})); }})()")).await;
        page.value(&format!("document.querySelector('input[value=\"{window}\"]').click()")).await;
        let svg = "document.querySelector('figure[data-key=\"198.51.100.1:443 tcp\"] svg')";
        page.until(&format!("document.getElementById('caption').textContent.includes({}) && {svg}.dataset.to - {svg}.dataset.from >= {}", json!(if node.is_empty() { "all nodes" } else { node }), 60 * step)).await;
        page.until("!document.querySelector('.plots').hasAttribute('aria-busy')").await;
        let told = numbers(&mut page, "198.51.100.1:443 tcp").await;
        assert_eq!((told[0].0, told.len()), (NOW - 60 * step, 60));
        let stored = world.stored("198.51.100.1:443", (NOW - 60 * step, NOW), step, node);
        for (at, value) in &told {
            assert_eq!(*value, stored.get(at).copied(), "{node} {window} {}", at - T0);
        }
        // The picture has the same numbers, at their places.
        let data = page.value(&format!("Object.fromEntries(Object.entries({svg}.dataset).map(([name, value]) => [name, Number(value)]))")).await;
        let of = |name: &str| data[name].as_f64().unwrap();
        let height = |value: f64| of("top") + of("high") - value / of("max") * of("high");
        let path = page.text(&format!("{svg}.querySelector('path.line').getAttribute('d')")).await;
        let drawn: Vec<(f64, f64)> = path
            .split(['M', 'L'])
            .filter(|it| !it.is_empty())
            .map(|it| {
                let (x, y) = it.split_once('H').unwrap().0.split_once(' ').unwrap();
                (x.parse().unwrap(), y.parse().unwrap())
            })
            .collect();
        assert_eq!(drawn.len(), told.len());
        for ((at, value), (x, y)) in told.iter().zip(&drawn) {
            let place = of("left") + (*at as f64 - of("from")) / (of("to") - of("from")) * of("inner");
            assert!((x - place).abs() < 0.06 && (y - height(value.unwrap())).abs() < 0.06, "{at}: {x} {y}");
        }
        let plan = page.value(&format!("['data-value', 'y1', 'y2'].map((it) => Number({svg}.querySelector('line.plan').getAttribute(it)))")).await;
        let plan: Vec<f64> = plan.as_array().unwrap().iter().map(|it| it.as_f64().unwrap()).collect();
        assert!(
            (plan[0] - planned).abs() < 1e-6
                && (plan[1] - height(planned)).abs() < 1e-6
                && plan[1] == plan[2],
            "{plan:?}"
        );
    }
    // A node that fell silent is not one without use.
    page.value("(() => { const it = document.getElementById('node'); it.value = 'n4'; it.dispatchEvent(new Event('change', {bubbles: true})); })()").await;
    page.until("document.getElementById('caption').textContent.includes('n4') && !document.querySelector('.plots').hasAttribute('aria-busy')").await;
    let told = numbers(&mut page, "198.51.100.1:443 tcp").await;
    for (at, value) in &told {
        assert_eq!(*value, (*at < T0 + SILENT_AFTER).then_some(77.0), "{}", at - T0);
    }
    let sum = page.text("document.querySelector('figure p').textContent").await;
    assert!(sum.starts_with("no report now, highest 77 ports"), "{sum}");
    assert!(sum.contains("9 of 60 steps without any report"), "{sum}: the last minute may still come");
    assert_eq!(page.value("document.querySelectorAll('figure rect.gap.none').length").await, 1);
    page.picture("silent").await;
    assert_eq!(page.wrongs(&world.url, "").await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_view_is_reached_by_keys_alone() {
    let (world, mut page) = (World::start().await, Page::open().await);
    page.go(&format!("{}/", world.url)).await;
    page.until("document.activeElement.id === 'token'").await;
    page.write("admin").await;
    page.key("Enter").await;
    page.until("document.querySelector('#list tbody') && document.activeElement.tagName === 'H1'").await;
    page.tab_to("it.id === 'filter'").await;
    page.tab_to("it.hash === '#/address/192.0.2.1'").await;
    page.key("Enter").await;
    page.until("document.activeElement.textContent === '192.0.2.1' && document.querySelector('.plot .line')")
        .await;
    page.tab_to("it.role === 'option'").await;
    let slice = "Number(document.activeElement.dataset.slice)";
    assert_eq!(page.value(slice).await, 4);
    let columns = page
        .value("getComputedStyle(document.querySelector('.strip')).gridTemplateColumns.split(' ').length")
        .await
        .as_i64()
        .unwrap();
    for (key, expected) in [
        ("ArrowRight", 5),
        ("ArrowDown", 5 + columns),
        ("ArrowUp", 5),
        ("ArrowLeft", 4),
        ("ArrowLeft", 4),
        ("End", 255),
        ("ArrowRight", 255),
        ("Home", 4),
        ("PageDown", 12),
        ("PageDown", 20),
        ("PageUp", 12),
        ("PageUp", 4),
        ("PageDown", 12),
    ] {
        page.key(key).await;
        assert_eq!(page.value(slice).await, expected, "{key}");
        let seen = page.value("document.activeElement.matches(':focus-visible') && document.getElementById('slice').textContent.startsWith(`Slice ${document.activeElement.dataset.slice},`)").await;
        assert_eq!(seen, true, "{key}: what has the focus is seen and told");
    }
    page.key("Enter").await;
    page.until("document.getElementById('node').value === 'n2'").await;
    page.key("Tab").await;
    let out = page.value("document.activeElement.role !== 'option'").await;
    assert_eq!(out, true, "one Tab leads out of 252 cells");
    page.tab_to("it.name === 'window'").await;
    page.key("ArrowRight").await;
    page.until("document.querySelector('input[value=\"1 hour\"]').checked && document.getElementById('caption').textContent.includes('a minute')").await;
    page.tab_to("it.id === 'node'").await;
    page.tab_to("it.matches('svg.plot')").await;
    let readout = "document.activeElement.parentElement.querySelector('output').textContent";
    page.key("Home").await;
    let first = page.text(readout).await;
    assert!(first.contains("23:00:00: "), "{first}");
    page.key("ArrowRight").await;
    assert!(page.text(readout).await.contains("23:01:00: "));
    for (link, sign) in
        [("#/alerts", "#conditions table"), ("#/policies", "#policies table"), ("#/accounts", "#list table")]
    {
        page.tab_to(&format!("it.hash === '{link}' && it.closest('nav')")).await;
        page.key("Enter").await;
        page.until(&format!("document.querySelector('{sign}')")).await;
        let here = page.text("document.querySelector('nav [aria-current=page]').hash").await;
        assert_eq!(here, link);
    }
    page.tab_to("it.id === 'out'").await;
    page.key("Enter").await;
    page.until("document.activeElement.id === 'token'").await;
    assert_eq!(page.wrongs(&world.url, "").await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_text_and_nothing_leaves_the_page() {
    let (world, mut page) = (World::start().await, Page::open().await);
    for (view, place) in [
        ("#/accounts", "#list"),
        ("#/address/192.0.2.1", "main"),
        ("#/policies", "#policies"),
        ("#/alerts", "#conditions"),
    ] {
        signed(&world, &mut page, "admin", view).await;
        page.until(&format!(
            "document.querySelector({}).textContent.includes({})",
            json!(place),
            json!(NASTY)
        ))
        .await;
        assert_eq!(
            page.value("window.taken ?? document.querySelectorAll('main script, main img').length").await,
            0,
            "{view}"
        );
    }
    page.value("location.hash = '#/address/' + encodeURIComponent('<img src=x onerror=window.taken=1>')")
        .await;
    page.until("document.querySelector('.notice.bad')").await;
    assert_eq!(page.value("window.taken ?? document.querySelectorAll('main img').length").await, 0);
    // And if something were taken for HTML, the browser would not run it.
    let asked = page.value("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.taken=1\">'); new Promise((done) => addEventListener('securitypolicyviolation', () => done(window.taken ?? 'kept'), {once: true}))").await;
    assert_eq!(asked, "kept");
    let elsewhere = page.value("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'kept')").await;
    assert_eq!(elsewhere, "kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_fits_a_phone_in_light_and_dark() {
    let (world, mut page) = (World::start().await, Page::open().await);
    for (view, sign) in [
        ("#/accounts", "#list table"),
        ("#/alerts", "#conditions table"),
        ("#/policies", "#policies table"),
        ("#/address/192.0.2.1", ".plot .line"),
    ] {
        signed(&world, &mut page, "admin", view).await;
        page.until(&format!("document.querySelector('{sign}')")).await;
        for (width, height, name) in [(1_280, 900, "desk"), (360, 740, "phone")] {
            page.size(width, height).await;
            page.until(&format!("screen.width === {width}")).await;
            // Plots are drawn anew for their new width.
            page.until("[...document.querySelectorAll('.plot')].every((it) => it.viewBox.baseVal.width === it.clientWidth)").await;
            for scheme in ["light", "dark"] {
                page.scheme(scheme).await;
                let dark = page.value("matchMedia('(prefers-color-scheme: dark)').matches").await;
                assert_eq!(dark, scheme == "dark");
                let wide = page.value("document.documentElement.scrollWidth").await;
                assert!(wide.as_i64() <= Some(i64::from(width)), "{view} at {width}: {wide}");
                let view = view.trim_start_matches("#/").split('/').next().unwrap();
                page.picture(&format!("{name}-{scheme}-{view}")).await;
            }
        }
    }
    // What one touches on a phone is large enough.
    let small = page.value("[...document.querySelectorAll('nav a, button, select')].filter((it) => it.offsetParent && it.id !== 'skip' && it.getBoundingClientRect().height < 32).map((it) => it.outerHTML)").await;
    assert_eq!(small, json!([]));
    page.value("sessionStorage.clear(); location.hash = '#/accounts'").await;
    page.until("document.getElementById('token')").await;
    assert_eq!(page.value("document.documentElement.scrollWidth <= innerWidth").await, true);
    page.picture("phone-sign-in").await;
    assert_eq!(page.wrongs(&world.url, "").await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_sees_nothing_of_another() {
    let (world, mut page) = (World::start().await, Page::open().await);
    for (view, sign) in [
        ("#/accounts", "document.querySelector('#list table')"),
        ("#/address/203.0.113.77", "document.querySelector('.notice.bad')"),
        ("#/policies", "document.querySelector('#policies table')"),
        ("#/alerts", "document.querySelector('#conditions table')"),
    ] {
        signed(&world, &mut page, "account-x", view).await;
        page.until(sign).await;
        let text = page.text("document.body.textContent").await;
        for secret in ["203.0.113.77", "y-node", "y-policy", "y-app", "y-message", "no-mail", "4,242"] {
            // What one has asked for by name is in the page's own words.
            assert!(view.contains(secret) || !text.contains(secret), "{view} {secret}: {text}");
        }
    }
    signed(&world, &mut page, "account-nobody", "#/accounts").await;
    page.until("document.querySelector('#list .notice')").await;
    let text = page.text("document.getElementById('list').textContent").await;
    assert!(text.contains("no account with addresses that you may see"), "{text}");
    assert_eq!(page.wrongs(&world.url, "").await, [""; 0]);
}

/// A part of an answer is none: it is said what is missing, and tried again.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_known_is_said() {
    let (world, mut page) = (World::of(None, &[]).await, Page::open().await);
    for view in ["#/accounts", "#/alerts", "#/policies", "#/address/192.0.2.1"] {
        let remember = "location.protocol === 'http:' && sessionStorage.setItem('aegis-token', 'admin')";
        page.call("Page.addScriptToEvaluateOnNewDocument", json!({ "source": remember })).await;
        page.go("about:blank").await;
        page.go(&format!("{}/{view}", world.url)).await;
        page.until("document.querySelector('#trouble .notice.bad')").await;
        let told = page.text("document.getElementById('trouble').textContent").await;
        let expected = "The collector cannot answer: objects of the cluster are not known at the moment. Nothing is shown yet.";
        assert_eq!(told, expected, "{view}");
        assert_eq!(page.text("document.getElementById('live').textContent").await, "Not live. Trying again.");
    }
    assert_eq!(page.wrongs(&world.url, "").await, [""; 0]);
}

/// How much is sent, and how long it takes until the first chart is there: `--nocapture` shows it.
#[tokio::test(flavor = "multi_thread")]
async fn it_is_small() {
    let (world, mut page) = (World::start().await, Page::open().await);
    let watch = "sessionStorage.setItem('aegis-token', 'admin');
        new MutationObserver((_, it) => {
            if (!document.querySelector('.plot .line')) return;
            window.first = performance.now();
            it.disconnect();
        }).observe(document, {childList: true, subtree: true});";
    page.call("Page.addScriptToEvaluateOnNewDocument", json!({ "source": watch })).await;
    let mut first = Vec::new();
    let mut sent = 0;
    for turn in 0..5 {
        page.events.clear();
        page.call("Network.setCacheDisabled", json!({ "cacheDisabled": true })).await;
        page.go("about:blank").await;
        page.go(&format!("{}/#/address/192.0.2.1", world.url)).await;
        page.until("window.first").await;
        first.push(page.value("Math.round(window.first)").await.as_i64().unwrap());
        if turn == 0 {
            let files: std::collections::BTreeSet<String> = page
                .events
                .iter()
                .filter(|(method, it)| {
                    method == "Network.responseReceived"
                        && it["response"]["url"].as_str().is_some_and(|url| {
                            url.ends_with('/') || url.contains("#/") || url.contains("/page/")
                        })
                })
                .map(|(_, it)| it["requestId"].to_string())
                .collect();
            sent = page
                .events
                .iter()
                .filter(|(method, it)| {
                    method == "Network.loadingFinished" && files.contains(&it["requestId"].to_string())
                })
                .map(|(_, it)| it["encodedDataLength"].as_f64().unwrap() as i64)
                .sum();
            assert!(files.len() >= 14, "{files:?}");
        }
    }
    first.sort_unstable();
    println!("page: {sent} bytes with headers; first chart after {} ms (median of 5: {first:?})", first[2]);
    assert!(sent > 0 && sent < 64 << 10, "{sent} bytes");
}
