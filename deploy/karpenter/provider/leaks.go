package provider

import (
	"context"
	"errors"
	"time"

	"github.com/awslabs/operatorpkg/reconciler"
	"github.com/awslabs/operatorpkg/singleton"
	controllerruntime "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	karpenter "sigs.k8s.io/karpenter/pkg/apis/v1"
	"sigs.k8s.io/karpenter/pkg/cloudprovider"
)

const (
	// How often instances are held against NodeClaims.
	sweep = time.Minute
	// A NodeClaim that was just made may not have been seen.
	young = time.Minute
)

// Leaks ends instances of this cell that no NodeClaim stands for: a claim that was
// deleted before its provider id was on it is let go of without them.
type Leaks struct {
	provider *Provider
	now      func() time.Time
}

func (p *Provider) Leaks() *Leaks { return &Leaks{provider: p, now: time.Now} }

func (l *Leaks) Register(_ context.Context, m manager.Manager) error {
	return controllerruntime.NewControllerManagedBy(m).
		Named("instance.leaks").
		WatchesRawSource(singleton.Source()).
		Complete(singleton.AsReconciler(l))
}

func (l *Leaks) Name() string { return "instance.leaks" }

func (l *Leaks) Reconcile(ctx context.Context) (reconciler.Result, error) {
	// Instances first: whatever is among them had its NodeClaim before.
	instances, err := l.provider.List(ctx)
	if err != nil {
		return reconciler.Result{}, err
	}
	claims := &karpenter.NodeClaimList{}
	if err := l.provider.client.List(ctx, claims); err != nil {
		return reconciler.Result{}, err
	}
	known := map[string]bool{}
	for i := range claims.Items {
		known[claims.Items[i].Name] = true
	}
	var failures []error
	for _, instance := range instances {
		if known[instance.Name] || l.now().Sub(instance.CreationTimestamp.Time) < young {
			continue
		}
		log.FromContext(ctx).Info("ending an instance that no NodeClaim stands for", "instance", instance.Name)
		err := l.provider.Delete(ctx, instance)
		failures = append(failures, cloudprovider.IgnoreNodeClaimNotFoundError(err))
	}
	return reconciler.Result{RequeueAfter: sweep}, errors.Join(failures...)
}
