package provider

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/awslabs/operatorpkg/status"
	"k8s.io/apimachinery/pkg/api/equality"
	controllerruntime "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"spindrift.dev/karpenter/api"
	"spindrift.dev/karpenter/driver"
)

// How often a class is held against what the driver offers.
const look = time.Minute

// Classes says of each HostClass whether the driver can make its hosts: Karpenter
// brings none of a class that is not Ready.
type Classes struct {
	client    client.Client
	catalogue *catalogue
}

func (p *Provider) Classes() *Classes {
	return &Classes{client: p.client, catalogue: p.catalogue}
}

func (c *Classes) Register(_ context.Context, m manager.Manager) error {
	return controllerruntime.NewControllerManagedBy(m).
		Named("hostclass").
		For(&api.HostClass{}).
		Complete(reconcile.AsReconciler(m.GetClient(), c))
}

func (c *Classes) Reconcile(ctx context.Context, class *api.HostClass) (reconcile.Result, error) {
	stored := class.DeepCopy()
	shapes, err := c.catalogue.shapes(ctx, class)
	conditions := class.StatusConditions()
	switch {
	case errors.Is(err, driver.ErrInvalid):
		conditions.SetFalse(status.ConditionReady, "Refused", err.Error())
	case err != nil:
		// Hosts may come when it is back: nothing of the class is wrong.
		conditions.SetUnknownWithReason(status.ConditionReady, "DriverAway", err.Error())
	case len(shapes) == 0:
		conditions.SetFalse(status.ConditionReady, "NothingOffered",
			"the driver offers no shape in a zone that spec.shapes and spec.zones allow")
	default:
		conditions.SetTrue(status.ConditionReady)
	}
	if err == nil {
		class.Status.Shapes = nil
		for _, shape := range shapes {
			class.Status.Shapes = append(class.Status.Shapes, shape.Name)
		}
		slices.Sort(class.Status.Shapes)
	}
	if !equality.Semantic.DeepEqual(stored, class) {
		if err := c.client.Status().Patch(ctx, class, client.MergeFrom(stored)); client.IgnoreNotFound(err) != nil {
			return reconcile.Result{}, fmt.Errorf("writing the status of HostClass %s: %w", class.Name, err)
		}
	}
	return reconcile.Result{RequeueAfter: look}, nil
}
