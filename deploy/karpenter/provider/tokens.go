package provider

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"spindrift.dev/karpenter/api"
	"spindrift.dev/karpenter/driver"
)

// How long a host may take to join: as long as Karpenter waits for its Node.
const tokenLife = 15 * time.Minute

// tokens makes the bootstrap tokens with which hosts join. Their names follow from
// the hosts', so none has to be read or listed: this identity can do neither.
type tokens struct {
	client client.Client
	// How hosts reach the cell, and its authority's PEM.
	server, authority string
	now               func() time.Time
}

// make gives the host a token that is good once and soon ends. One of an earlier
// attempt, which no instance has got, is void.
func (t *tokens) make(ctx context.Context, host string) (*driver.Bootstrap, error) {
	id := tokenID(host)
	bytes := make([]byte, 8)
	if _, err := rand.Read(bytes); err != nil {
		return nil, err
	}
	secret := hex.EncodeToString(bytes)
	object := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{
			Name:        secretName(host),
			Namespace:   metav1.NamespaceSystem,
			Annotations: map[string]string{api.HostAnnotation: host},
		},
		Type: corev1.SecretTypeBootstrapToken,
		StringData: map[string]string{
			"token-id":                       id,
			"token-secret":                   secret,
			"expiration":                     t.now().Add(tokenLife).UTC().Format(time.RFC3339),
			"usage-bootstrap-authentication": "true",
			"auth-extra-groups":              api.BootstrapGroup,
		},
	}
	err := t.client.Create(ctx, object.DeepCopy())
	if apierrors.IsAlreadyExists(err) {
		if err := t.remove(ctx, host); err != nil {
			return nil, err
		}
		err = t.client.Create(ctx, object)
	}
	if err != nil {
		return nil, fmt.Errorf("making the token with which %s joins: %w", host, err)
	}
	return &driver.Bootstrap{Server: t.server, Authority: t.authority, Token: id + "." + secret}, nil
}

// remove makes the host's token void. One that is not there is fine.
func (t *tokens) remove(ctx context.Context, host string) error {
	object := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{
		Name:      secretName(host),
		Namespace: metav1.NamespaceSystem,
	}}
	if err := client.IgnoreNotFound(t.client.Delete(ctx, object)); err != nil {
		return fmt.Errorf("removing the token of %s: %w", host, err)
	}
	return nil
}

// The cell's authenticator finds the Secret by this name.
func secretName(host string) string { return "bootstrap-token-" + tokenID(host) }

// tokenID is public: what has to be guessed is the secret.
func tokenID(host string) string {
	sum := sha256.Sum256([]byte(host))
	return hex.EncodeToString(sum[:3])
}
