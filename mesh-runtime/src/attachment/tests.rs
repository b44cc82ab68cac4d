use proptest::prelude::*;

use super::*;

fn after(mode: Mode, events: &[Event]) -> Attachment {
    events.iter().fold(Attachment::new(mode), |attachment, &event| {
        attachment.step(event).unwrap().0
    })
}

#[test]
fn a_pod_serves_once_redirected_identified_and_synced_in_whatever_order_the_facts_come() {
    use AttachmentState::*;
    for (events, state) in [
        (&[][..], Detached),
        (&[Event::Attach], Detached),
        (&[Event::Attach, Event::Redirected], Redirected),
        (&[Event::Attach, Event::CertificateHeld, Event::Synced], Detached),
        (&[Event::Attach, Event::Redirected, Event::Synced], Redirected),
        (
            &[Event::Attach, Event::Redirected, Event::CertificateHeld],
            Identified,
        ),
        (
            &[
                Event::Attach,
                Event::Redirected,
                Event::CertificateHeld,
                Event::Synced,
            ],
            Serving,
        ),
        (
            &[
                Event::Synced,
                Event::Attach,
                Event::CertificateHeld,
                Event::Redirected,
            ],
            Serving,
        ),
    ] {
        assert_eq!(after(Mode::Enrolled, events).state(), state, "{events:?}");
    }
}

#[test]
fn an_unmeshed_pod_waits_for_no_certificate() {
    let redirected = after(Mode::Unmeshed, &[Event::Attach, Event::Redirected]);
    assert_eq!(redirected.state(), AttachmentState::Identified);
    assert_eq!(
        redirected.step(Event::Synced).unwrap().0.state(),
        AttachmentState::Serving
    );
}

#[test]
fn an_expired_certificate_takes_a_pod_back_until_the_next_one() {
    let serving = [
        Event::Attach,
        Event::Redirected,
        Event::Synced,
        Event::CertificateHeld,
    ];
    let lost = after(Mode::Enrolled, &serving)
        .step(Event::CertificateLost)
        .unwrap()
        .0;
    assert_eq!(lost.state(), AttachmentState::Redirected);
    assert_eq!(
        lost.step(Event::CertificateHeld).unwrap().0.state(),
        AttachmentState::Serving
    );
}

#[test]
fn a_detached_pod_is_not_attached_again() {
    let ended = after(
        Mode::Enrolled,
        &[Event::Attach, Event::Redirected, Event::Drain, Event::Drained],
    );
    assert_eq!(ended.state(), AttachmentState::Detached);
    let refusal = ended.step(Event::Attach).unwrap_err();
    assert_eq!(
        refusal.to_string(),
        "an attachment that is detached does not take Attach"
    );
}

#[test]
fn a_draining_pod_is_not_attached_again() {
    let draining = after(Mode::Enrolled, &[Event::Attach, Event::Redirected, Event::Drain]);
    assert_eq!(
        draining.step(Event::Attach),
        Err(Refusal {
            state: AttachmentState::Draining,
            event: Event::Attach
        })
    );
}

#[test]
fn an_attachment_that_broke_off_half_way_is_cleaned_up_like_a_whole_one() {
    let attaching = after(Mode::Enrolled, &[Event::Attach]);
    let (draining, effects) = attaching.step(Event::Drain).unwrap();
    assert_eq!(effects, [Effect::RemoveFromProxy, Effect::Drop]);
    assert_eq!(draining.state(), AttachmentState::Draining);
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        Just(Event::Attach),
        Just(Event::Redirected),
        Just(Event::CertificateHeld),
        Just(Event::CertificateLost),
        Just(Event::Synced),
        Just(Event::Drain),
        Just(Event::Drained),
    ]
}

fn mode() -> impl Strategy<Value = Mode> {
    prop_oneof![Just(Mode::Enrolled), Just(Mode::Unmeshed)]
}

proptest! {
    /// Carries out each effect at once, on a model of what is in place.
    #[test]
    fn whatever_happens_the_order_of_proxy_and_kernel_holds(
        mode in mode(),
        events in proptest::collection::vec(event(), 0..40),
    ) {
        let mut attachment = Attachment::new(mode);
        let (mut known, mut redirected, mut drained) = (false, false, false);
        let (mut held, mut synced) = (mode == Mode::Unmeshed, false);
        for event in events {
            let Ok((next, effects)) = attachment.step(event) else {
                continue;
            };
            attachment = next;
            for effect in effects {
                match effect {
                    Effect::AddToProxy => known = true,
                    Effect::Redirect => {
                        prop_assert!(known, "redirected to a proxy that does not know the pod");
                        redirected = true;
                    }
                    Effect::RemoveFromProxy => {
                        known = false;
                        drained = true;
                    }
                    Effect::Drop => {
                        prop_assert!(drained, "cut before its time to drain");
                        redirected = false;
                    }
                }
            }
            match event {
                Event::CertificateHeld => held = true,
                Event::CertificateLost => held = mode == Mode::Unmeshed,
                Event::Synced => synced = true,
                _ => {}
            }
            match attachment.state() {
                AttachmentState::Serving => prop_assert!(known && redirected && held && synced),
                AttachmentState::Identified => prop_assert!(known && redirected && held),
                AttachmentState::Redirected => prop_assert!(known && redirected),
                AttachmentState::Draining | AttachmentState::Detached => {}
            }
        }
    }

    #[test]
    fn a_refused_event_changes_nothing_and_names_itself(
        mode in mode(),
        events in proptest::collection::vec(event(), 0..20),
        last in event(),
    ) {
        let mut attachment = Attachment::new(mode);
        for event in events {
            if let Ok((next, _)) = attachment.step(event) {
                attachment = next;
            }
        }
        if let Err(refusal) = attachment.step(last) {
            prop_assert_eq!(refusal, Refusal { state: attachment.state(), event: last });
        }
    }
}
